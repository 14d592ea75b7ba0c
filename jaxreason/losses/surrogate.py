"""Surrogates: the per-token policy loss as a function of the ratio, the advantage and the log-prob.

Each takes ``Tokens`` and its own keyword options and returns the loss [B, T] to minimise and flags [B, T] (1 where the
token was clipped from below or above) that become the clip fractions.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.lax import stop_gradient
from jax.nn import sigmoid
from pydantic import Field

from jaxreason.errors import present
from jaxreason.losses.inputs import Fraction
from jaxreason.losses.segments import Sequences, sequence_mean, sequence_sum
from jaxreason.losses.tokens import reward_to_go

Steps = Annotated[int, Field(ge=0)]
_SELECTED = "PolicyInputs.selected (the step-wide rule's pick)"


class Tokens(NamedTuple):
    """What a surrogate may read, all [B, T], 0 at masked positions."""

    logp: Array
    old_logp: Array
    advantages: Array
    log_w: Array  # log ratio at the chosen level
    sequences: Sequences
    selected: Array | None  # > 0 where the step-wide rule picked the token
    rho: Array | None = None  # weights that correct for the sampler, detached; None: no correction
    extras: Mapping[str, Array] = MappingProxyType({})  # those that ``Variant.extras`` names


class Surrogate(NamedTuple):
    loss: Array  # [B, T]
    clipped_low: Array  # [B, T] bool
    clipped_high: Array  # [B, T] bool
    corrected: bool = False  # rho is in it already


_SMALLEST = 1e-8  # a ratio of whole sequences in vespo, and what a token adds to it at least


def _unclipped(loss: Array) -> Surrogate:
    never = jnp.zeros(loss.shape, bool)
    return Surrogate(loss, never, never)


def ppo_clip(
    x: Tokens,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float | None = None,
    dual_clip: float | None = None,
) -> Surrogate:
    """-min(min(w, ratio_cap) A, clip(w, 1 - clip_low, 1 + clip_high) A), PPO (1707.06347).

    ``ratio_cap`` (delta) bounds w also where A < 0: two-sided clip, INTELLECT-2 (2505.07291). ``dual_clip`` (c > 1)
    bounds the loss by -c A where A < 0 (1912.09729).
    """
    w, a = jnp.exp(x.log_w), x.advantages
    raw = w if ratio_cap is None else jnp.minimum(w, ratio_cap)
    loss = -jnp.minimum(raw * a, jnp.clip(w, 1.0 - clip_low, 1.0 + clip_high) * a)
    if dual_clip is not None:
        loss = jnp.where(a < 0, jnp.minimum(loss, -dual_clip * a), loss)
    return Surrogate(loss, (w < 1.0 - clip_low) & (a < 0), (w > 1.0 + clip_high) & (a > 0))


def aspo(x: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.2, weight_max: float = 3.0) -> Surrogate:
    """-sg[min(v, weight_max)] A log pi with v = 1 / w where A > 0 and w elsewhere. ASPO (2510.06062): of what is right, the
    tokens that the policy lost move most.

    As in PPO, tokens with A > 0 and w > 1 + ``clip_high``, or A < 0 and w < 1 - ``clip_low``, are dropped. ``weight_max`` bounds
    the weight and keeps the gradient (soft dual clip; 3 in the authors' code, Archer2.0).
    """
    w, a = jnp.exp(x.log_w), x.advantages
    low, high = (w < 1.0 - clip_low) & (a < 0), (w > 1.0 + clip_high) & (a > 0)
    weight = stop_gradient(jnp.minimum(jnp.where(a > 0, jnp.exp(-x.log_w), w), weight_max))
    return Surrogate(-jnp.where(low | high, 0.0, weight) * a * x.logp, low, high)


def fipo(
    x: Tokens,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    ratio_cap: float | None = 10.0,
    half_life: float = 32.0,
    influence_low: Fraction = 0.0,
    influence_high: float = 0.2,
    safe_ratio: float | None = 4.0,
) -> Surrogate:
    """sg[f_t] times ``ppo_clip``, f_t = clip(exp(F_t), 1 - influence_low, 1 + influence_high). FIPO (2603.19835).

    F_t = sum_{k >= t} 2^(-(k - t) / half_life) l_k, without the l_k of tokens with w > ``ratio_cap``: whether the policy moves
    towards the rest of the completion or away from it. Where A < 0 and w > ``safe_ratio``, f_t lies within [0.8, 1]. The defaults
    are ms-swift's, with the cap of the authors' 32B script.
    """
    w = jnp.exp(x.log_w)
    counted = x.log_w if ratio_cap is None else jnp.where(w > ratio_cap, 0.0, x.log_w)
    future = reward_to_go(counted, x.sequences, 2.0 ** (-1.0 / half_life))
    influence = jnp.clip(jnp.exp(jnp.clip(future, -20.0, 20.0)), 1.0 - influence_low, 1.0 + influence_high)
    if safe_ratio is not None:
        influence = jnp.where((x.advantages < 0) & (w > safe_ratio), jnp.clip(influence, 0.8, 1.0), influence)
    found = ppo_clip(x, clip_low=clip_low, clip_high=clip_high, ratio_cap=ratio_cap)
    return found._replace(loss=stop_gradient(influence) * found.loss)


def upper_cap(x: Tokens, *, clip_high: float = 0.28) -> Surrogate:
    """-min(w, 1 + clip_high) A: clipped from above only, for either sign of A. TIC-GRPO's later form (2508.02833)."""
    w = jnp.exp(x.log_w)
    high = w > 1.0 + clip_high
    return Surrogate(-jnp.minimum(w, 1.0 + clip_high) * x.advantages, jnp.zeros_like(high), high)


def cispo(x: Tokens, *, ratio_min: float | None = None, ratio_max: float = 5.0) -> Surrogate:
    """-sg[clip(w, ratio_min, ratio_max)] A log pi: no token loses its gradient. CISPO (2506.13585).

    Both bounds are absolute values of w, not distances from 1.
    """
    w = jnp.exp(x.log_w)
    low = jnp.zeros(w.shape, bool) if ratio_min is None else w < ratio_min
    bounded = stop_gradient(jnp.clip(w, ratio_min, ratio_max))
    return Surrogate(-bounded * x.advantages * x.logp, low, w > ratio_max)


def gmpo(x: Tokens, *, clip_low: float = 0.4, clip_high: float = 0.4) -> Surrogate:
    """-exp(mean_t c_t) A, the geometric mean of clipped token ratios. GMPO (2507.20673).

    c_t = min(l_t, clip_high) where A >= 0 and max(l_t, -clip_low) where A < 0; the bounds are on the logarithm. A correction
    for the sampler enters as its geometric mean over the sequence (verl).
    """
    log_w, a = x.log_w, x.advantages
    clipped = jnp.where(a >= 0, jnp.minimum(log_w, clip_high), jnp.maximum(log_w, -clip_low))
    loss = -jnp.exp(sequence_mean(clipped, x.sequences)) * a
    if x.rho is not None:
        loss = loss * jnp.exp(sequence_mean(jnp.log(x.rho + 1e-10), x.sequences))
    low, high = (log_w < -clip_low) & (a < 0), (log_w > clip_high) & (a >= 0)
    return Surrogate(loss, low, high, corrected=x.rho is not None)


def reinforce(x: Tokens) -> Surrogate:
    """-A log pi: no ratio, no clip."""
    return _unclipped(-x.advantages * x.logp)


def importance(x: Tokens) -> Surrogate:
    """-w A: importance-weighted, no clip."""
    return _unclipped(-jnp.exp(x.log_w) * x.advantages)


def sapo(x: Tokens, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Surrogate:
    """-(4 / tau) sigmoid(tau (w - 1)) A with tau by the sign of A. SAPO (2511.20347).

    Its slope in w is sech^2(tau (w - 1) / 2), 1 at w = 1.
    """
    tau = jnp.where(x.advantages > 0, tau_positive, tau_negative)
    return _unclipped(-4.0 / tau * sigmoid(tau * (jnp.exp(x.log_w) - 1.0)) * x.advantages)


def vespo(
    x: Tokens,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> Surrogate:
    """-sg[W^k exp(lambda (1 - W))] A log pi with W the ratio of whole sequences. VESPO (2602.10693).

    log W = clip(sum_t (clip(l_t, +-20) + log rho_t), log 1e-8, 20) with log rho_t in [log 1e-8, 20]: a correction for the
    sampler enters W instead of multiplying the loss. k and lambda by the sign of A. ``ratio`` must be ``token`` and
    ``correction`` by token: W is formed here.
    """
    log_w = jnp.clip(x.log_w, -20.0, 20.0)
    if x.rho is not None:
        log_w = log_w + jnp.log(jnp.clip(x.rho, _SMALLEST, math.exp(20.0)))
    log_w = jnp.clip(sequence_sum(log_w, x.sequences), math.log(_SMALLEST), 20.0)
    k = jnp.where(x.advantages >= 0, k_positive, k_negative)
    lam = jnp.where(x.advantages >= 0, lambda_positive, lambda_negative)
    gain = stop_gradient(jnp.exp(lam + k * log_w - lam * jnp.exp(log_w)))
    return _unclipped(-gain * x.advantages * x.logp)._replace(corrected=x.rho is not None)


def dppo(
    x: Tokens,
    *,
    max_rise: float = 0.2,
    max_fall: float = 0.2,
    divergence: Literal["tv", "kl"] = "tv",
    region: Literal["signed", "symmetric"] = "signed",
    form: Literal["importance", "reinforce"] = "importance",
    ratio_cap: float | None = None,
    log_ratio_coef: float = 1e-3,
) -> Surrogate:
    """-keep w A + log_ratio_coef l^2, a trust region on probabilities instead of ratios. DPPO (2602.04879).

    The distance of the token's probability p from the behaviour's q is |p - q| (``tv``, DPPO-Binary-TV) or
    q log(q / p) + (1 - q) log((1 - q) / (1 - p)) (``kl``, DPPO-Binary-KL). A token is dropped where that is above ``max_rise``
    and p rose with A > 0, or above ``max_fall`` and p fell with A < 0; ``symmetric``: whatever the sign of A (prime-rl's ipo).
    ``reinforce`` has -sg[w] A log p instead of -w A, with the same gradient (verl). ``ratio_cap`` bounds w from above.
    """
    p, q = stop_gradient(jnp.exp(x.logp)), jnp.exp(x.old_logp)
    distance = jnp.abs(p - q) if divergence == "tv" else _binary_kl(x.old_logp, stop_gradient(x.logp))
    high, low = (distance > max_rise) & (p > q), (distance > max_fall) & (p < q)
    if region == "signed":
        high, low = high & (x.advantages > 0), low & (x.advantages <= 0)
    w = jnp.exp(x.log_w)
    w = w if ratio_cap is None else jnp.minimum(w, ratio_cap)
    gain = w * x.advantages if form == "importance" else stop_gradient(w) * x.advantages * x.logp
    return Surrogate(-jnp.where(high | low, 0.0, gain) + log_ratio_coef * jnp.square(x.log_w), low, high)


def _binary_kl(old_logp: Array, logp: Array) -> Array:
    """KL of the coin that lands on the token under the behaviour from the one under the policy, nats."""
    p, q, tiny = jnp.exp(logp), jnp.exp(old_logp), 1e-8
    return q * (old_logp - logp) + (1.0 - q) * jnp.log((1.0 - q + tiny) / (1.0 - p + tiny))


def topr(x: Tokens, *, positive_weight: float = 1.0, negative_weight: float = 1.0) -> Surrogate:
    """-positive_weight A log pi where A > 0, -negative_weight sg[min(w, 1)] A log pi elsewhere. TOPR (2503.14286): what is
    wrong is unlearned only as far as the policy still does it."""
    w = stop_gradient(jnp.exp(x.log_w))
    high = (w > 1.0) & (x.advantages <= 0)
    weight = jnp.where(x.advantages > 0, positive_weight, negative_weight * jnp.minimum(w, 1.0))
    return Surrogate(-weight * x.advantages * x.logp, jnp.zeros_like(high), high)


def dro(x: Tokens, *, beta: float = 0.1) -> Surrogate:
    """-A log pi + beta / 2 l^2: REINFORCE held to the behaviour. DRO (2405.19107); Kimi k1.5 (2501.12599)."""
    return _unclipped(-x.advantages * x.logp + 0.5 * beta * jnp.square(x.log_w))


def luffy(x: Tokens, *, shape: Annotated[float, Field(gt=0)] = 0.1) -> Surrogate:
    """-w A of what the policy drew, -p / (p + shape) A of the expert's tokens, whose probabilities are taken as 1; p = pi itself.
    LUFFY (2504.14945, its code without a clip): what is unlikely to the policy moves it most."""
    p = jnp.exp(x.logp)
    gain = jnp.where(x.extras["expert"] > 0, p / (p + shape), jnp.exp(x.log_w))
    return _unclipped(-gain * x.advantages)


def chord(
    x: Tokens,
    *,
    mu: Fraction = 0.1,
    mu_valley: Fraction | None = None,
    mu_warmup_steps: Steps = 0,
    mu_decay_steps: Steps = 0,
    phi: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Surrogate:
    """(1 - mu) ``ppo_clip`` over what the policy drew + mu (-sg[p (1 - p)] log p) over the expert's tokens, each a mean over its
    own tokens; without ``phi`` -log p. CHORD (2508.11408).

    mu rises to its value over ``mu_warmup_steps`` steps of the run, and falls by half a cosine to ``mu_valley`` over the
    ``mu_decay_steps`` after them (CHORD-mu); by default it is constant (CHORD-phi).
    """
    weight: Array | float = mu
    if mu_warmup_steps or mu_decay_steps:
        valley, end = (mu if mu_valley is None else mu_valley), mu_warmup_steps + max(1, mu_decay_steps)
        weight = optax.warmup_cosine_decay_schedule(0.0, mu, mu_warmup_steps, end, valley)(x.extras["step"])
    drawn, low, high, _ = ppo_clip(x, clip_low=clip_low, clip_high=clip_high)
    p = stop_gradient(jnp.exp(x.logp))
    taught = -(p * (1.0 - p) if phi else 1.0) * x.logp
    expert, sampled = x.extras["expert"], x.extras["sampled"]
    mixed = (1.0 - weight) * sampled * drawn + weight * expert * taught
    return Surrogate(mixed, low & (sampled > 0), high & (sampled > 0))


def nothing(x: Tokens) -> Surrogate:
    """0: rewards are measured and teach nothing; what is left are the terms of the other axes."""
    return _unclipped(jnp.zeros_like(x.logp))


def real(x: Tokens, *, real_tau: Annotated[float, Field(gt=0)] = 0.5) -> Surrogate:
    """selected e^{-s / tau} where A > 0, selected e^{s / tau} elsewhere, s the mean log-ratio of the sequence. REAL (2602.05630).

    REAL is log(1 + sum_+ e^{-s/tau}) + log(1 + sum_- e^{s/tau}) of the completions of a prompt, whose derivative by one s is
    that of its exponential over (1 + sum). This denominator, at the policy that is being updated, is what ``selected`` holds
    (``jaxreason.losses.variants``); so the gradient is REAL's, and the value is sum / (1 + sum) instead of log(1 + sum).
    """
    return _unclipped(present(x.selected, _SELECTED) * jnp.exp(real_exponent(x.log_w, x.advantages, real_tau)))


def real_exponent(log_w: Array, advantages: Array, tau: float) -> Array:
    """[B, T] -s / tau where A > 0, s / tau elsewhere, within +-60."""
    return jnp.clip(jnp.where(advantages > 0, -log_w, log_w) / tau, -60.0, 60.0)


def clip_cov(x: Tokens, *, clip_low: float = 0.2, clip_high: float = 1.0) -> Surrogate:
    """``ppo_clip`` without the selected tokens, those apart that it clips. Clip-Cov (2505.22617)."""
    loss, low, high, _ = ppo_clip(x, clip_low=clip_low, clip_high=clip_high)
    return Surrogate(jnp.where((present(x.selected, _SELECTED) > 0) & ~(low | high), 0.0, loss), low, high)


def kl_cov(x: Tokens, *, cov_kl_coef: float = 1.0) -> Surrogate:
    """-w A, plus ``cov_kl_coef`` |log w| on the selected tokens. KL-Cov (2505.22617)."""
    penalty = jnp.where(present(x.selected, _SELECTED) > 0, jnp.abs(x.log_w), 0.0)
    return _unclipped(-jnp.exp(x.log_w) * x.advantages + cov_kl_coef * penalty)
