"""Surrogates: the per-token policy loss as a function of the ratio, the advantage and the log-prob.

Each takes ``Tokens`` and its own keyword options and returns the loss [B, T] to minimise and flags [B, T] (1 where the
token was clipped from below or above) that become the clip fractions.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from jax.nn import sigmoid

from jaxreason.errors import present
from jaxreason.losses.segments import Sequences, sequence_mean, sequence_sum

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

    c_t = min(l_t, clip_high) where A >= 0 and max(l_t, -clip_low) where A < 0; the bounds are on the logarithm.
    """
    log_w, a = x.log_w, x.advantages
    clipped = jnp.where(a >= 0, jnp.minimum(log_w, clip_high), jnp.maximum(log_w, -clip_low))
    loss = -jnp.exp(sequence_mean(clipped, x.sequences)) * a
    return Surrogate(loss, (log_w < -clip_low) & (a < 0), (log_w > clip_high) & (a >= 0))


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


def dppo(x: Tokens, *, max_rise: float = 0.2, max_fall: float = 0.2, log_ratio_coef: float = 1e-3) -> Surrogate:
    """-keep w A + log_ratio_coef log^2 w, trust region on probabilities instead of ratios. DPPO-TV, as in prime-rl.

    A token is dropped when its probability rose by more than ``max_rise`` with A > 0, or fell by more than ``max_fall``
    with A < 0.
    """
    change = stop_gradient(jnp.exp(x.logp) - jnp.exp(x.old_logp))
    high = (change > max_rise) & (x.advantages > 0)
    low = (change < -max_fall) & (x.advantages < 0)
    gain = jnp.where(high | low, 0.0, jnp.exp(x.log_w) * x.advantages)
    return Surrogate(-gain + log_ratio_coef * jnp.square(x.log_w), low, high)


def clip_cov(x: Tokens, *, clip_low: float = 0.2, clip_high: float = 1.0) -> Surrogate:
    """``ppo_clip`` with the gradient of the selected tokens removed. Clip-Cov (2505.22617)."""
    clipped = ppo_clip(x, clip_low=clip_low, clip_high=clip_high)
    return clipped._replace(loss=jnp.where(present(x.selected, _SELECTED) > 0, stop_gradient(clipped.loss), clipped.loss))


def kl_cov(x: Tokens, *, cov_kl_coef: float = 1.0) -> Surrogate:
    """-w A, plus ``cov_kl_coef`` |log w| on the selected tokens. KL-Cov (2505.22617)."""
    penalty = jnp.where(present(x.selected, _SELECTED) > 0, jnp.abs(x.log_w), 0.0)
    return _unclipped(-jnp.exp(x.log_w) * x.advantages + cov_kl_coef * penalty)
