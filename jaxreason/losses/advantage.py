"""Advantages: rewards [P, G] of P prompts with G samples each -> advantages [P, G], once a step, on the host or in jit.

A NaN reward means "no reward" (an answer that could not be graded): the sample counts in no statistic and its advantage
is 0. Where frameworks differ (degrees of freedom and epsilon of the standard deviation, a group of one) the choice is
an option. Axes: P prompts, G group, F reward functions.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxreason import plugins
from jaxreason.errors import UserError
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
    if singleton == "raw":
        alone = jnp.sum(valid, axis=1, keepdims=True) == 1
        result = jnp.where(alone, values, result)
    return jnp.where(valid, result, 0.0)


def center(rewards_P_G: ArrayLike) -> Array:
    """R - mean_g: no division. Dr.GRPO (2503.20783), prime-rl."""
    values, valid = _graded(rewards_P_G)
    return _centred(values, valid, axis=1)


def raw(rewards_P_G: ArrayLike) -> Array:
    """R itself: no baseline."""
    return _graded(rewards_P_G)[0]


def zero(rewards_P_G: ArrayLike) -> Array:
    """0: the rewards are measured and teach nothing, as where a teacher alone does (on-policy distillation)."""
    return jnp.zeros_like(_graded(rewards_P_G)[0])


def rloo(rewards_P_G: ArrayLike) -> Array:
    """R_i - mean_{j != i} R_j = n / (n - 1) (R_i - mean), leave-one-out. RLOO (2402.14740). A group of one gets 0."""
    values, valid = _graded(rewards_P_G)
    n = jnp.sum(valid, axis=1, keepdims=True, dtype=jnp.float32)
    return _centred(values, valid, axis=1) * jnp.where(n > 1, n / jnp.maximum(n - 1.0, 1.0), 0.0)


def lite_ppo(rewards_P_G: ArrayLike, *, ddof: int = 1, eps: float = 1e-4) -> Array:
    """(R - mean_g) / (std of all rewards + eps): group mean, batch std. LitePPO (2508.08221)."""
    values, valid = _graded(rewards_P_G)
    spread = _std(_centred(values, valid, axis=None), valid, None, ddof, eps)
    return _centred(values, valid, axis=1) / spread


def reinforce_pp(rewards_P_G: ArrayLike, *, ddof: int = 1, eps: float = 1e-8) -> Array:
    """(R - mean) / (std + eps) over the batch, no groups. REINFORCE++ (2501.03262) without a per-token reward; with
    KL in the reward use ``tokens.reinforce_pp_tokens``."""
    values, valid = _graded(rewards_P_G)
    centred = _centred(values, valid, axis=None)
    return centred / _std(centred, valid, None, ddof, eps)


def reinforce_pp_baseline(rewards_P_G: ArrayLike, *, ddof: int = 1, eps: float = 1e-8) -> Array:
    """R - mean_g, then whitened over the batch by the std of the centred rewards. REINFORCE++-baseline (2501.03262)."""
    values, valid = _graded(rewards_P_G)
    return reinforce_pp(jnp.where(valid, _centred(values, valid, axis=1), jnp.nan), ddof=ddof, eps=eps)


def maxrl(rewards_P_G: ArrayLike, *, eps: float = 1e-6) -> Array:
    """(R - mean_g) / (mean_g + eps), for rewards >= 0; a group without success gets 0. MaxRL (2602.02710)."""
    values, valid = _graded(rewards_P_G)
    mean = _mean(values, valid, axis=1)
    return _centred(values, valid, axis=1) / (mean + eps)


def gpg(rewards_P_G: ArrayLike, *, f_norm: float = 1.0) -> Array:
    """alpha (R - mean_g) / f_norm, alpha = samples / samples in groups with unequal rewards. GPG (2504.02546).

    alpha makes up for the groups whose gradient is zero.
    """
    values, valid = _graded(rewards_P_G)
    centred = _centred(values, valid, axis=1)
    useful = jnp.any(centred != 0, axis=1, keepdims=True) & valid
    alpha = jnp.sum(valid, dtype=jnp.float32) / jnp.maximum(jnp.sum(useful, dtype=jnp.float32), 1.0)
    return alpha * centred / f_norm


def tic_lc(rewards_P_G: ArrayLike, lengths_P_G: ArrayLike, *, ddof: int = 0, eps: float = 1e-6) -> Array:
    """(x - mean_g x) / (std_g x + eps) with x = R / length: TIC-GRPO's length-corrected form (2508.02833 v5).

    ``lengths_P_G`` are completion tokens. In an all-correct group it favours short answers; x's std is of the order of
    1 / length, so eps is compared with that.
    """
    lengths = jnp.maximum(jnp.asarray(lengths_P_G, jnp.float32), 1.0)
    return grpo(jnp.asarray(rewards_P_G, jnp.float32) / lengths, ddof=ddof, eps=eps)


def gdpo(
    rewards_P_G: ArrayLike, rewards_F_P_G: ArrayLike, weights_F: ArrayLike, *, ddof: int = 1, eps: float = 1e-4
) -> Array:
    """Each of F rewards z-scored in its group, weighted sum, z-score over the batch. GDPO (2601.05242).

    ``rewards_P_G``, the weighted sums of the rewards themselves, are not read. A sample that lacks one reward gets 0 from
    it; one that lacks all gets 0.
    """
    del rewards_P_G
    rewards_F_P_G, weights_F = jnp.asarray(rewards_F_P_G, jnp.float32), jnp.asarray(weights_F, jnp.float32)
    total = sum(weight * grpo(rewards, ddof=ddof, eps=eps) for weight, rewards in zip(weights_F, rewards_F_P_G))
    any_valid = jnp.any(jnp.isfinite(rewards_F_P_G), axis=0)
    return reinforce_pp(jnp.where(any_valid, total, jnp.nan), ddof=ddof, eps=eps)


ESTIMATORS: dict[str, Callable[..., Array]] = {
    f.__name__: f
    for f in (
        grpo, center, raw, zero, rloo, lite_ppo, reinforce_pp, reinforce_pp_baseline, maxrl, gpg, tic_lc, gdpo,
    )
}  # fmt: skip

# The z-scores that the frameworks share; the other estimators keep their papers' constants.
_PRESET_ESTIMATORS = ("grpo", "lite_ppo", "gdpo")
PRESETS: dict[str, dict[str, Any]] = {
    "trl": {"ddof": 1, "eps": 1e-4},
    "verl": {"ddof": 1, "eps": 1e-6, "singleton": "raw"},
    "nemo": {"ddof": 1, "eps": 1e-6},
}


def get(name: str, /, *, preset: str | None = None, **options: Any) -> Estimator:
    """The estimator ``name`` with its options bound: a built-in, ``package.module:function`` or ``path/file.py:function``.

    ``preset`` (``trl``, ``verl``, ``nemo``) sets that framework's ddof, eps and singleton rule for grpo, lite_ppo and
    gdpo. Raises UserError for an unknown name, preset or option, and for a value that does not fit its annotation.
    """
    if ":" not in name and name not in ESTIMATORS:
        raise UserError(
            f"advantage.name {name!r} is unknown{plugins.nearest(name, ESTIMATORS)}; it is one of {', '.join(ESTIMATORS)}, "
            "or package.module:function, or path/to/file.py:function"
        )
    if preset is not None and preset not in PRESETS:
        raise UserError(f"loss.preset {preset!r} is unknown; it is one of {', '.join(PRESETS)}")
    function = plugins.load(name, "advantage.name") if ":" in name else ESTIMATORS[name]
    options = plugins.check_options(function, options, "advantage.options", GIVEN)
    if preset is not None and name in _PRESET_ESTIMATORS:
        known = plugins.declared_options(function, GIVEN)
        options = {key: value for key, value in PRESETS[preset].items() if key in known} | options
    return Estimator(name, options, function)


def informative_groups(rewards_P_G: ArrayLike) -> Array:
    """[P] bool: groups whose graded rewards differ, the only ones with a gradient (DAPO's dynamic sampling,
    2503.14476)."""
    values, valid = _graded(rewards_P_G)
    return jnp.any(_centred(values, valid, axis=1) != 0, axis=1)


def _graded(rewards_P_G: ArrayLike) -> tuple[Array, Array]:
    """(rewards with 0 for the missing ones, which are there), both [P, G]."""
    rewards_P_G = jnp.asarray(rewards_P_G, jnp.float32)
    valid = ~jnp.isnan(rewards_P_G)
    return jnp.where(valid, rewards_P_G, 0.0), valid


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
