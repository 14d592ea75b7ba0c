"""Advantages: rewards [P, G] of P prompts with G samples each -> advantages [P, G], once a step, on the host or in jit.

A NaN reward means "no reward" (an answer that could not be graded): the sample counts in no statistic and its advantage
is 0. Where frameworks differ (degrees of freedom and epsilon of the standard deviation, a group of one) the choice is
an option. Axes: P prompts, G group, F reward functions.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from pydantic import Field

from jaxreason import plugins
from jaxreason.errors import UserError
from jaxreason.losses import by_token, presets, tokens
from jaxreason.losses.estimator import GIVEN, Estimator

Singleton = Literal["zero", "raw"]


def grpo(rewards_P_G: ArrayLike, *, ddof: int = 1, eps: float = 1e-4, singleton: Singleton = "zero") -> Array:
    """(R - mean_g) / (std_g + eps), GRPO (2402.03300).

    ``ddof``: 1 divides the variance by n - 1 (torch's default), 0 by n. A group of equal rewards gets exactly 0,
    whatever eps is. ``singleton``: what a group with one graded sample gets, 0 (``zero``) or its reward (``raw``,
    verl).
    """
    values, valid = _graded(rewards_P_G)
    centred = _centred(values, valid, axis=1)
    result = centred / _std(centred, valid, 1, ddof, eps)
    return jnp.where(valid, jnp.where(_alone(valid) & (singleton == "raw"), values, result), 0.0)


def center(rewards_P_G: ArrayLike, *, singleton: Singleton = "zero") -> Array:
    """R - mean_g: no division. Dr.GRPO (2503.20783), prime-rl. ``singleton`` as in ``grpo``."""
    values, valid = _graded(rewards_P_G)
    return _less_group_mean(values, valid, singleton)


def raw(rewards_P_G: ArrayLike) -> Array:
    """R itself: no baseline."""
    return _graded(rewards_P_G)[0]


def zero(rewards_P_G: ArrayLike) -> Array:
    """0: the rewards are measured and teach nothing, as where a teacher alone does (on-policy distillation)."""
    return jnp.zeros_like(_graded(rewards_P_G)[0])


def rloo(rewards_P_G: ArrayLike, *, singleton: Singleton = "zero") -> Array:
    """R_i - mean_{j != i} R_j = n / (n - 1) (R_i - mean), leave-one-out. RLOO (2402.14740). ``singleton`` as in ``grpo``."""
    values, valid = _graded(rewards_P_G)
    n = jnp.sum(valid, axis=1, keepdims=True, dtype=jnp.float32)
    return _less_group_mean(values, valid, singleton) * jnp.where(n > 1, n / jnp.maximum(n - 1.0, 1.0), 1.0)


def grpo_loo(rewards_P_G: ArrayLike, *, ddof: int = 1, eps: float = 1e-6) -> Array:
    """(R_i - mean) / (std + eps), both over the others of the group; undivided where these are all equal. NeMo-RL's default.

    [1, 0, 0, 1]: the others of the first have mean 1/3 and std sqrt(1/3), so its advantage is 1.155. A group of one gets 0.
    """
    values, valid = _graded(rewards_P_G)
    others = valid[:, None, :] & ~jnp.eye(valid.shape[1], dtype=bool)
    n = jnp.sum(others, axis=2, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(others, values[:, None, :], 0.0), axis=2) / jnp.maximum(n, 1.0)
    high = jnp.max(jnp.where(others, values[:, None, :], -jnp.inf), axis=2)
    low = jnp.min(jnp.where(others, values[:, None, :], jnp.inf), axis=2)
    squares = jnp.sum(jnp.where(others, jnp.square(values[:, None, :] - mean[:, :, None]), 0.0), axis=2)
    std = jnp.sqrt(squares / jnp.maximum(n - ddof, 1.0)) + eps
    mean = jnp.where(high == low, low, mean)  # exact, so that a group of equal rewards gets exactly 0
    return jnp.where(valid & (n > 0), (values - mean) / jnp.where((high > low) & (n > ddof), std, 1.0), 0.0)


def opo(rewards_P_G: ArrayLike, lengths_P_G: ArrayLike, *, singleton: Singleton = "zero") -> Array:
    """R - sum_j n_j R_j / sum_j n_j, n completion tokens: the baseline of least variance. OPO (2505.23585). ``singleton`` as
    in ``grpo``."""
    values, valid = _graded(rewards_P_G)
    lengths = jnp.where(valid, jnp.asarray(lengths_P_G, jnp.float32), 0.0)
    return _less_group_mean(values, valid, singleton, lengths)


def passk(rewards_P_G: ArrayLike, *, ddof: int = 1, eps: float = 1e-6) -> Array:
    """(largest - second largest) / (std_g + eps) for the best sample of a group, 0 for the others: pass@k policy optimization
    (2503.19595), as verl's ``grpo_passk`` has it. A group of one gets 0."""
    values, valid = _graded(rewards_P_G)
    ordered = jnp.sort(jnp.where(valid, values, -jnp.inf), axis=1)
    two = jnp.sum(valid, axis=1, keepdims=True) > 1
    lead = jnp.where(two, ordered[:, -1:] - ordered[:, -2:-1], 0.0)
    best = jnp.arange(valid.shape[1]) == jnp.argmax(jnp.where(valid, values, -jnp.inf), axis=1)[:, None]
    return jnp.where(best & two, lead / _std(_centred(values, valid, axis=1), valid, 1, ddof, eps), 0.0)


def passk_training(rewards_P_G: ArrayLike, *, k: Annotated[int, Field(ge=1)] = 4, eps: float = 1e-6) -> Array:
    """The advantage of a sample as a member of random sets of k samples of its group, each of which earns its best reward:
    Pass@k training in closed form (2508.10751). ``k`` 1 is GRPO with ddof 0; 4 is ours, the paper varies it.

    With n samples, c of them right, m = n - c: mean rho = 1 - C(m, k) / C(n, k), spread s = sqrt(rho (1 - rho)). A right sample
    gets (1 - rho) / (s + eps), a wrong one (1 - rho - C(m - 1, k - 1) / C(n - 1, k - 1)) / (s + eps). In a group with fewer
    than k graded samples k is their number. Raises UserError for rewards other than 0 and 1; under jit every reward that is not
    1 is 0.
    """
    values, valid = _graded(rewards_P_G)
    if not isinstance(values, jax.core.Tracer) and not np.all(np.isin(values, (0.0, 1.0))):
        other = float(np.asarray(values)[~np.isin(values, (0.0, 1.0))][0])
        raise UserError(
            f"advantage.name passk_training counts right and wrong answers, and a reward is {other:.4g}; use rewards of 0 and 1, "
            "such as accuracy alone"
        )
    right = valid & (values == 1.0)
    n, c = (jnp.sum(x, axis=1, keepdims=True, dtype=jnp.float32) for x in (valid, right))
    rho = 1.0 - _share_of_sets(n - c, n, jnp.minimum(k, n), k)
    spread = jnp.sqrt(rho * (1.0 - rho)) + eps
    lost = _share_of_sets(n - c - 1.0, n - 1.0, jnp.minimum(k, n) - 1.0, k - 1)
    mixed = (c > 0) & (rho < 1.0)
    return jnp.where(valid & mixed, jnp.where(right, 1.0 - rho, 1.0 - rho - lost) / jnp.where(mixed, spread, 1.0), 0.0)


def remax(rewards_P_G: ArrayLike, greedy_P: ArrayLike) -> Array:
    """R - R of the prompt's greedy completion. ReMax (2310.10505). A group whose greedy completion has no reward gets 0."""
    values, valid = _graded(rewards_P_G)
    baseline = jnp.asarray(greedy_P, jnp.float32)[:, None]
    return jnp.where(valid & ~jnp.isnan(baseline), values - jnp.nan_to_num(baseline), 0.0)


def luffy(rewards_P_G: ArrayLike, expert_P_G: ArrayLike) -> Array:
    """R - the mean over what the policy drew for the prompt, for the expert's answer too. LUFFY (2504.14945), as its code has
    it; the paper's mean is over all."""
    values, valid = _graded(rewards_P_G)
    drawn = jnp.where(valid & ~jnp.asarray(expert_P_G, bool), 1.0, 0.0)
    return _less_group_mean(values, valid, "zero", drawn)


def lite_ppo(rewards_P_G: ArrayLike, *, ddof: int = 1, eps: float = 1e-4) -> Array:
    """(R - mean_g) / (std of all rewards + eps): group mean, batch std. LitePPO (2508.08221)."""
    values, valid = _graded(rewards_P_G)
    spread = _std(_centred(values, valid, axis=None), valid, None, ddof, eps)
    return _centred(values, valid, axis=1) / spread


def reinforce_pp(
    rewards_P_G: ArrayLike,
    lengths_P_G: ArrayLike,
    *,
    gamma: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-8,
    whiten: Literal["token", "none"] = "token",
) -> list[list[np.ndarray]]:
    """[P][G] of [n]: the reward-to-go gamma^(n - 1 - t) R of every token, whitened over the tokens of the step; no groups.
    REINFORCE++ (2501.03262). With KL in the reward the loop gives ``tokens.reinforce_pp_tokens`` its token rewards, too.

    ``lengths_P_G`` are completion tokens. ``whiten``: ``none`` leaves the returns as they are (slime's default).
    """
    values, valid = _graded(rewards_P_G)
    lengths = np.where(np.asarray(valid), np.nan_to_num(np.asarray(lengths_P_G, np.float64)), 0).astype(int)
    mask = jnp.asarray(np.arange(max(lengths.max(initial=0), 1)) < lengths.reshape(-1, 1), jnp.float32)
    scores, none = values.reshape(-1, 1) * mask, jnp.zeros(mask.shape)
    found = tokens.reinforce_pp_tokens(scores, none, none, mask, gamma=gamma, ddof=ddof, eps=eps, whiten=whiten)
    rows = iter(np.asarray(found))
    # What has no reward is one token long here, with advantage 0.
    return [[next(rows)[: max(n, 1)] for n in row] for row in lengths]


def reinforce_pp_baseline(
    rewards_P_G: ArrayLike,
    lengths_P_G: ArrayLike,
    *,
    ddof: int = 1,
    eps: float = 1e-8,
    singleton: Singleton = "zero",
    whiten: Literal["sample", "token", "none"] = "sample",
) -> Array:
    """R - mean_g, then whitened over the batch by the std of the centred rewards. REINFORCE++-baseline (2501.03262).

    ``whiten``: every sample counts once (``sample``), or once for each of its ``lengths_P_G`` completion tokens (``token``, verl
    and NeMo-RL), or nothing is divided (``none``, slime's default). ``singleton`` as in ``grpo``.
    """
    values, valid = _graded(rewards_P_G)
    return _whiten(_less_group_mean(values, valid, singleton), valid, lengths_P_G, whiten, ddof, eps)


def maxrl(rewards_P_G: ArrayLike, *, eps: float = 1e-6) -> Array:
    """(R - mean_g) / (mean_g + eps), for rewards >= 0; a group without success gets 0. MaxRL (2602.02710).

    Raises UserError for a group whose mean is negative: dividing by it would turn every advantage around. Under jit such a
    group gets 0.
    """
    values, valid = _graded(rewards_P_G)
    mean = _mean(values, valid, axis=1)
    if not isinstance(mean, jax.core.Tracer) and np.min(mean, initial=0.0) < 0:
        raise UserError(
            f"advantage.name maxrl divides by a group's mean reward, and one has {np.min(mean):.4g}: every advantage would "
            "change its sign; use rewards that are at least 0, or another estimator, such as center"
        )
    return jnp.where(mean > 0, _centred(values, valid, axis=1) / jnp.where(mean > 0, mean + eps, 1.0), 0.0)


def gpg(
    rewards_P_G: ArrayLike, *, f_norm: float = 1.0, alpha: Literal["groups", "nonzero"] = "groups", singleton: Singleton = "zero"
) -> Array:
    """alpha (R - mean_g) / f_norm, alpha = samples / samples in groups with unequal rewards. GPG (2504.02546).

    alpha makes up for the groups whose gradient is zero; ``nonzero``: samples / samples whose reward is not 0 (verl).
    ``singleton`` as in ``grpo``.
    """
    values, valid = _graded(rewards_P_G)
    useful = (values != 0) if alpha == "nonzero" else jnp.any(_centred(values, valid, axis=1) != 0, axis=1, keepdims=True)
    share = jnp.sum(valid, dtype=jnp.float32) / jnp.maximum(jnp.sum(useful & valid, dtype=jnp.float32), 1.0)
    return share * _less_group_mean(values, valid, singleton) / f_norm


def tic_lc(rewards_P_G: ArrayLike, lengths_P_G: ArrayLike, *, ddof: int = 0, eps: float = 1e-6) -> Array:
    """(x - mean_g x) / (std_g x + eps) with x = R / length: TIC-GRPO's length-corrected form (2508.02833 v5).

    ``lengths_P_G`` are completion tokens. In an all-correct group it favours short answers; x's std is of the order of
    1 / length, so eps is compared with that.
    """
    lengths = jnp.maximum(jnp.asarray(lengths_P_G, jnp.float32), 1.0)
    return grpo(jnp.asarray(rewards_P_G, jnp.float32) / lengths, ddof=ddof, eps=eps)


def gdpo(
    rewards_P_G: ArrayLike,
    rewards_F_P_G: ArrayLike,
    weights_F: ArrayLike,
    lengths_P_G: ArrayLike,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
    baseline: Literal["group", "others"] = "group",
    whiten: Literal["sample", "token"] = "sample",
) -> Array:
    """Each of F rewards z-scored in its group, weighted sum, z-score over the batch. GDPO (2601.05242).

    ``rewards_P_G``, the weighted sums of the rewards themselves, are not read. A sample that lacks one reward gets 0 from
    it; one that lacks all gets 0. ``baseline``: the z-score is ``grpo``'s (``group``), or ``grpo_loo``'s (``others``, NeMo-RL).
    ``whiten`` as in ``reinforce_pp_baseline``, ``singleton`` as in ``grpo``.
    """
    del rewards_P_G
    rewards_F_P_G, weights_F = jnp.asarray(rewards_F_P_G, jnp.float32), jnp.asarray(weights_F, jnp.float32)

    def z_score(rewards: Array) -> Array:
        if baseline == "others":
            return grpo_loo(rewards, ddof=ddof, eps=eps)
        return grpo(rewards, ddof=ddof, eps=eps, singleton=singleton)

    total = sum((weight * z_score(rewards) for weight, rewards in zip(weights_F, rewards_F_P_G)), jnp.zeros(()))
    return _whiten(total, jnp.any(jnp.isfinite(rewards_F_P_G), axis=0), lengths_P_G, whiten, ddof, eps)


ESTIMATORS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        grpo, center, raw, zero, rloo, grpo_loo, opo, passk, passk_training, remax, luffy, by_token.process, by_token.otb,
        lite_ppo, reinforce_pp, reinforce_pp_baseline, maxrl, gpg, tic_lc, gdpo,
    )
}  # fmt: skip


def get(name: str, /, *, preset: str | None = None, **options: Any) -> Estimator:
    """The estimator ``name`` with its options bound: a built-in, ``package.module:function`` or ``path/file.py:function``.

    ``preset`` sets what that framework (``losses.presets``) changes in it. Raises UserError for an unknown name, preset or
    option, and for a value that does not fit its annotation.
    """
    if ":" not in name and name not in ESTIMATORS:
        raise UserError(
            f"advantage.name {name!r} is unknown{plugins.nearest(name, ESTIMATORS)}; it is one of {', '.join(ESTIMATORS)}, "
            "or package.module:function, or path/to/file.py:function"
        )
    changed = {} if preset is None else presets.find(preset).estimators.get(name, {})
    function = plugins.load(name, "advantage.name") if ":" in name else ESTIMATORS[name]
    options = plugins.check_options(function, options, "advantage.options", GIVEN)
    return Estimator(name, {**changed, **options}, function)


def informative_groups(rewards_P_G: ArrayLike) -> Array:
    """[P] bool: groups whose graded rewards differ, the only ones with a gradient (DAPO's dynamic sampling,
    2503.14476)."""
    values, valid = _graded(rewards_P_G)
    return jnp.any(_centred(values, valid, axis=1) != 0, axis=1)


def _graded(rewards_P_G: ArrayLike) -> tuple[Array, Array]:
    """(rewards with 0 for the missing ones, which are there), both [P, G]. Raises UserError for an infinite reward."""
    rewards_P_G = jnp.asarray(rewards_P_G, jnp.float32)
    if not isinstance(rewards_P_G, jax.core.Tracer) and np.any(np.isinf(rewards_P_G)):
        where = np.argwhere(np.isinf(rewards_P_G))[0]
        raise UserError(
            f"the reward of sample {where[1]} of group {where[0]} is infinite (or beyond 3.4e38); every advantage of its group "
            "would be NaN: return a finite number, or None for no reward"
        )
    valid = ~jnp.isnan(rewards_P_G)
    return jnp.where(valid, rewards_P_G, 0.0), valid


def _share_of_sets(wrong: Array, n: Array, k: Array, most: int) -> Array:
    """[P, 1] C(wrong, k) / C(n, k), the share of sets of k of n samples that hold wrong ones only; ``most``: no k is larger."""
    share = jnp.ones(n.shape)
    for j in range(most):
        factor = jnp.maximum(wrong - j, 0.0) / jnp.maximum(n - j, 1.0)
        share = jnp.where(j < k, share * factor, share)
    return share


def _alone(valid: Array) -> Array:
    """[P, 1] bool: one graded sample in the group."""
    return jnp.sum(valid, axis=1, keepdims=True) == 1


def _less_group_mean(values: Array, valid: Array, singleton: Singleton, weights: Array | None = None) -> Array:
    """values - mean_g, or the mean by ``weights`` [P, G]; of a group of one, 0 or its value."""
    centred = _centred(values, valid, axis=1)
    if weights is not None:
        mean = jnp.sum(weights * values, axis=1, keepdims=True) / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
        centred = jnp.where(valid & jnp.any(centred != 0, axis=1, keepdims=True), values - mean, 0.0)
    return jnp.where(valid & _alone(valid) & (singleton == "raw"), values, centred)


def _whiten(values: Array, valid: Array, lengths_P_G: ArrayLike, by: str, ddof: int, eps: float) -> Array:
    """(x - mean) / (std + eps) over the batch, every sample counted once or ``lengths_P_G`` times; ``none``: x."""
    if by == "none":
        return jnp.where(valid, values, 0.0)
    count = jnp.where(valid, jnp.asarray(lengths_P_G, jnp.float32) if by == "token" else 1.0, 0.0)
    mean = jnp.sum(count * values) / jnp.maximum(jnp.sum(count), 1.0)
    differ = jnp.max(jnp.where(valid, values, -jnp.inf)) > jnp.min(jnp.where(valid, values, jnp.inf))
    centred = jnp.where(valid & differ, values - mean, 0.0)
    std = jnp.sqrt(jnp.sum(count * jnp.square(centred)) / jnp.maximum(jnp.sum(count) - ddof, 1.0)) + eps
    return centred / jnp.where(std > 0, std, 1.0)


def _mean(values: Array, valid: Array, axis: int | None) -> Array:
    n = jnp.sum(valid, axis=axis, keepdims=True, dtype=jnp.float32)
    return jnp.sum(values, axis=axis, keepdims=True) / jnp.maximum(n, 1.0)


def _centred(values: Array, valid: Array, axis: int | None) -> Array:
    """values - mean, and exactly 0 where all are equal: rounding in the mean must not be divided by a tiny eps."""
    high = jnp.max(jnp.where(valid, values, -jnp.inf), axis=axis, keepdims=True)
    low = jnp.min(jnp.where(valid, values, jnp.inf), axis=axis, keepdims=True)
    return jnp.where(valid & (high > low), values - _mean(values, valid, axis), 0.0)


def _std(centred: Array, valid: Array, axis: int | None, ddof: int, eps: float) -> Array:
    """std + eps of centred values, and 1 where that is 0 (then the numerator is 0 too)."""
    n = jnp.sum(valid, axis=axis, keepdims=True, dtype=jnp.float32)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=axis, keepdims=True) / jnp.maximum(n - ddof, 1.0)) + eps
    return jnp.where(std > 0, std, 1.0)
