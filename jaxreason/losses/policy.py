"""A policy loss: ratio x surrogate x correction x masks x KL x aggregation, composed from one function an axis."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from pydantic import Field

from jaxreason.errors import UserError, present
from jaxreason.losses.inputs import Fraction, PolicyInputs, clean, need, totals_of
from jaxreason.losses.kl import KlEstimator, kl
from jaxreason.losses.ratio import Ratio, log_ratio
from jaxreason.losses.reduce import Reduce, reduction_weights
from jaxreason.losses.sampler_correction import DEFAULT_BOUNDS, Correction, off_policy_keep, sampler_weights
from jaxreason.losses.segments import Sequences
from jaxreason.losses.select import top_entropy_tokens
from jaxreason.losses.surrogate import Surrogate, Tokens
from jaxreason.types import Totals

Metrics = dict[str, Array]

Behaviour = Literal["old", "sampler"]
LOG_RATIO_CLAMP = 20.0  # e^20 is beyond any ratio that teaches, and its square is far from float32's end


def policy_loss(
    inputs: PolicyInputs,
    *,
    surrogate: Callable[..., Surrogate],
    select: Callable[..., Array] | None,
    ratio: Ratio = "token",
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
    reduce: Reduce = "seq-mean-token-mean",
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    kl_ratio: Literal["token", "surrogate"] = "token",
    kl_log_ratio_clamp: float | None = LOG_RATIO_CLAMP,
    kl_value_clamp: float | None = None,
    behaviour: Behaviour = "old",
    correction: Correction = "none",
    correction_min: float | None = None,
    correction_max: float | None = None,
    off_policy_threshold: float | None = None,
    off_policy_behaviour: Behaviour = "old",
    top_entropy: Fraction | None = None,
    entropy_coef: float = 0.0,
    entropy_over: Literal["all", "top"] = "all",
    **surrogate_options: Any,
) -> tuple[Array, Metrics]:
    """sum_t weight_t (surrogate_t * keep_t * rho_t + kl_coef KL_t) - entropy_coef mean_t H_t.

    Args:
      inputs: arrays [B, T]; masked positions may hold anything.
      surrogate: from ``jaxreason.losses.surrogate``; takes ``surrogate_options``.
      select: the step-wide rule that fills ``inputs.selected``, or None.
      ratio, log_ratio_clamp: see ``jaxreason.losses.ratio``.
      reduce, max_completion_tokens: see ``jaxreason.losses.reduce``.
      kl_coef, kl_estimator, kl_log_ratio_clamp, kl_value_clamp: KL in the loss, see ``jaxreason.losses.kl``. Neither
        the keep masks nor rho touch it.
      kl_ratio: the ratio that ``k3_unbiased`` multiplies by: each token's own (``token``, DeepSeek-V3.2), or the one of
        ``ratio`` (``surrogate``, TRL), which differs where that is of a whole sequence.
      behaviour: whose log-probs the ratio divides by: ``old`` (recomputed by the trainer) or ``sampler`` (as the
        sampler reported; verl's "bypass").
      correction, correction_min, correction_max: rho, see ``jaxreason.losses.sampler_correction``; bounds of None: its
        defaults. It multiplies the surrogate, except where the surrogate takes it into its own ratio (vespo).
      off_policy_threshold, off_policy_behaviour: drop sequences with A < 0 that drifted further than this from
        ``old`` or ``sampler``, nats per token (OPSM).
      top_entropy: keep the surrogate of only this fraction of the step's tokens, those of highest entropy (2506.01939).
      entropy_coef: coefficient of the entropy bonus; ``inputs.entropy_coef`` replaces it if given.
      entropy_over: the tokens whose mean entropy that is: ``all``, or those that ``top_entropy`` keeps, where it is set
        (``top``, TRL).

    Returns:
      The loss and metrics that add over microbatches (keys ending in _max: maximum; _min: minimum).
    """
    inputs, sequences = clean(inputs)
    totals = totals_of(inputs, sequences)
    behaviour_logp = _logp_of(behaviour, inputs)
    log_w = log_ratio(inputs.logp, behaviour_logp, ratio, log_ratio_clamp, sequences)

    selected = _selected(inputs, select)
    rho = _rho(inputs, correction, correction_min, correction_max, sequences)
    tokens = Tokens(inputs.logp, behaviour_logp, inputs.advantages, log_w, sequences, selected, rho)
    loss, clipped_low, clipped_high, corrected = surrogate(tokens, **surrogate_options)
    metrics = _ratio_metrics(log_w, sequences.live, totals) | _other_metrics(inputs, sequences.live, totals)
    metrics |= _clip_metrics(clipped_low, clipped_high, sequences.live, totals)

    if off_policy_threshold is not None:
        drifted_from = _logp_of(off_policy_behaviour, inputs)
        keep = off_policy_keep(inputs.logp, drifted_from, inputs.advantages, off_policy_threshold, sequences)
        loss = loss * keep
        metrics["off_policy_dropped"] = _mean(1.0 - keep, sequences.live, totals)
    if top_entropy is not None:
        picked = present(selected, "PolicyInputs.selected (top_entropy)")
        loss = jnp.where(picked > 0, loss, 0.0)
        metrics["selected_fraction"] = _mean(picked > 0, sequences.live, totals)
    if rho is not None:
        loss = loss if corrected else loss * rho
        metrics["correction_mean"] = _mean(rho, sequences.live, totals)
        metrics["correction_dropped"] = _mean(rho == 0, sequences.live, totals)

    if kl_coef != 0 or inputs.ref_logp is not None:
        estimate = kl(
            inputs.logp,
            need(inputs, "ref_logp", f"kl_coef {kl_coef}"),
            kl_estimator,
            log_ratio=log_ratio(
                inputs.logp, behaviour_logp, "token" if kl_ratio == "token" else ratio, log_ratio_clamp, sequences
            ),
            log_ratio_clamp=kl_log_ratio_clamp,
            value_clamp=kl_value_clamp,
        )
        metrics["kl"] = _mean(estimate, sequences.live, totals)
        if kl_coef != 0:
            loss = loss + kl_coef * estimate

    weights = reduction_weights(reduce, inputs, sequences, totals, max_completion_tokens)
    value = jnp.sum(weights * loss)

    coef = entropy_coef if inputs.entropy_coef is None else inputs.entropy_coef
    if inputs.entropy_coef is not None or entropy_coef != 0:
        bonus = coef * need(inputs, "entropy", "entropy_coef")
        if entropy_over == "top" and top_entropy is not None:
            bonus = bonus * present(selected, "PolicyInputs.selected (top_entropy)")
        value = value - jnp.sum(jnp.where(sequences.live, bonus, 0.0)) / jnp.maximum(totals.tokens, 1.0)
    return value, {key: stop_gradient(metric) for key, metric in metrics.items()}


def _selected(inputs: PolicyInputs, select: Callable[..., Array] | None) -> Array | None:
    """[B, T] what the step-wide rule picked, from the inputs, or by the rule where these are the whole step."""
    if select is None or inputs.selected is not None:
        return inputs.selected
    if inputs.totals is not None:
        raise UserError(
            "this loss picks tokens over the whole optimizer step; in a microbatch (totals is given) set "
            "PolicyInputs.selected to rows of Loss.select(inputs of the whole step, key)"
        )
    return select(inputs)


def _rho(
    inputs: PolicyInputs, correction: Correction, minimum: float | None, maximum: float | None, sequences: Sequences
) -> Array | None:
    """[B, T] weights of the correction for the sampler, with its default bounds for those of None; None without one."""
    if correction == "none":
        return None
    low, high = DEFAULT_BOUNDS[correction]
    low, high = low if minimum is None else minimum, high if maximum is None else maximum
    sampler_logp = need(inputs, "sampler_logp", f"correction {correction}")
    return sampler_weights(inputs.old_logp, sampler_logp, correction, low, high, sequences)


def adapt_entropy_coef(coef: float, entropy: float, target: float, delta: float = 0.005) -> tuple[float, float]:
    """Skywork-OR1's controller (2505.22312), run by the host once a step.

    The next coefficient is ``coef`` + delta below the target entropy and - delta above it, never negative; the bonus of
    this step uses ``coef`` only while the entropy is at or below the target.

    Returns:
      (the coefficient to use now, the coefficient to carry to the next step).
    """
    carried = coef + delta if entropy < target else coef - delta if entropy > target else coef
    return (coef if entropy <= target else 0.0), max(carried, 0.0)


def top_entropy_rule(fraction: float) -> Callable[..., Array]:
    """The step-wide rule of ``top_entropy``: tokens of the step / tokens picked on those picked, so that a sum over all of
    them divided by the step's tokens is a mean over the picked ones; 0 elsewhere."""

    def rule(inputs: PolicyInputs, key: Array | None = None) -> Array:
        del key
        picked = top_entropy_tokens(need(inputs, "entropy", "top_entropy"), inputs.mask, fraction)
        return picked * (jnp.sum(inputs.mask > 0, dtype=jnp.float32) / jnp.maximum(jnp.sum(picked), 1.0))

    return rule


def _logp_of(behaviour: Behaviour, inputs: PolicyInputs) -> Array:
    return inputs.old_logp if behaviour == "old" else need(inputs, "sampler_logp", "behaviour sampler")


def _mean(values: Array, live: Array, totals: Totals) -> Array:
    """This batch's contribution to the mean over the step's tokens."""
    total = jnp.sum(jnp.where(live, values.astype(jnp.float32), 0.0))
    return total / jnp.maximum(totals.tokens, 1.0)


def shared_metrics(inputs: PolicyInputs) -> Metrics:
    """What a policy is watched by whatever its loss: ``ratio_*`` and ``policy_kl`` of the token ratio, ``entropy``,
    ``sampler_gap``, ``sampler_gap_max`` and ``kl`` (k3), each where its inputs are there."""
    inputs, sequences = clean(inputs)
    totals = totals_of(inputs, sequences)
    log_w = log_ratio(inputs.logp, inputs.old_logp, "token", LOG_RATIO_CLAMP, sequences)
    metrics = _ratio_metrics(log_w, sequences.live, totals) | _other_metrics(inputs, sequences.live, totals)
    if inputs.ref_logp is not None:
        estimate = kl(inputs.logp, inputs.ref_logp, "k3", log_ratio=log_w, log_ratio_clamp=LOG_RATIO_CLAMP)
        metrics["kl"] = _mean(estimate, sequences.live, totals)
    return {key: stop_gradient(metric) for key, metric in metrics.items()}


def _ratio_metrics(log_w: Array, live: Array, totals: Totals) -> Metrics:
    w = jnp.exp(log_w)
    return {
        "ratio_mean": _mean(w, live, totals),
        # mean^2 / mean of squares is the effective sample size as a fraction.
        "ratio_square_mean": _mean(jnp.square(w), live, totals),
        # An empty microbatch must not decide the step's extremes; of a step that trains nothing they are 1.
        "ratio_max": jnp.where(totals.tokens > 0, jnp.max(jnp.where(live, w, 0.0)), 1.0),
        "ratio_min": jnp.where(totals.tokens > 0, jnp.min(jnp.where(live, w, jnp.inf)), 1.0),
        "policy_kl": _mean(jnp.expm1(log_w) - log_w, live, totals),
    }


def _clip_metrics(low: Array, high: Array, live: Array, totals: Totals) -> Metrics:
    return {
        "clip_fraction": _mean(low | high, live, totals),
        "clip_low_fraction": _mean(low, live, totals),
        "clip_high_fraction": _mean(high, live, totals),
    }


def _other_metrics(inputs: PolicyInputs, live: Array, totals: Totals) -> Metrics:
    found = {} if inputs.entropy is None else {"entropy": _mean(inputs.entropy, live, totals)}
    if inputs.sampler_logp is not None:
        gap = jnp.abs(inputs.old_logp - inputs.sampler_logp)
        found |= {"sampler_gap": _mean(gap, live, totals), "sampler_gap_max": jnp.max(jnp.where(live, gap, 0.0))}
    return found
