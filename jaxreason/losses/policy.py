"""A policy loss: ratio x surrogate x correction x masks x KL x aggregation, composed from one function an axis."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxreason.errors import UserError, present
from jaxreason.losses.axes import LOG_RATIO_CLAMP, Axes, Behaviour, CorrectionAxis, DistillAxis, Reduce
from jaxreason.losses.inputs import PolicyInputs, clean, need, need_extra, totals_of
from jaxreason.losses.kl import kl
from jaxreason.losses.ratio import log_ratio
from jaxreason.losses.reduce import reduction_weights
from jaxreason.losses.sampler_correction import DEFAULT_BOUNDS, normalizer, off_policy_keep, rejected, sampler_weights
from jaxreason.losses.segments import Sequences, sequences_of
from jaxreason.losses.select import top_entropy_tokens
from jaxreason.losses.surrogate import Surrogate, Tokens
from jaxreason.types import Totals

Metrics = dict[str, Array]


def policy_loss(
    inputs: PolicyInputs, axes: Axes, surrogate: Callable[[Tokens], Surrogate], select: Callable[..., Array] | None = None
) -> tuple[Array, Metrics]:
    """sum_t weight_t (surrogate_t * keep_t * rho_t + kl_coef KL_t + distill_coef D_t) - entropy_coef mean_t H_t.

    Args:
      inputs: arrays [B, T]; masked positions may hold anything.
      axes: every option but the surrogate's own.
      surrogate: from ``jaxreason.losses.surrogate``, its options bound.
      select: the step-wide rule that fills ``inputs.selected``, or None.

    Returns:
      The loss and metrics that add over microbatches (keys ending in _max: maximum; _min: minimum).
    """
    inputs, sequences = clean(inputs)
    totals = totals_of(inputs, sequences)
    behaviour_logp = _logp_of(axes.ratio.behaviour, inputs)
    log_w = log_ratio(inputs.logp, behaviour_logp, axes.ratio.ratio, axes.ratio.log_ratio_clamp, sequences)

    selected = _selected(inputs, select)
    rho = _rho(inputs, axes.correction, sequences)
    if rho is not None and axes.correction.correction_normalize == "step":
        rho = rho * present(selected, "PolicyInputs.selected (correction_normalize)")
    tokens = Tokens(inputs.logp, behaviour_logp, inputs.advantages, log_w, sequences, selected, rho, inputs.extras)
    loss, clipped_low, clipped_high, corrected = surrogate(tokens)
    # By token whatever the loss's own ratio is, so that losses can be compared: a sequence's mean is calmer than its tokens.
    watched = inputs.old_logp if axes.ratio.behaviour == "policy" else behaviour_logp
    by_token = log_ratio(inputs.logp, watched, "token", LOG_RATIO_CLAMP, sequences)
    metrics = _ratio_metrics(by_token, sequences.live, totals) | _other_metrics(inputs, sequences.live, totals)
    metrics |= _clip_metrics(clipped_low, clipped_high, sequences.live, totals)

    loss, dropped = _kept(loss, inputs, axes, selected, sequences)
    metrics |= {name: _mean(values, sequences.live, totals) for name, values in dropped.items()}
    if rho is not None:
        loss = loss if corrected else loss * rho
        metrics["correction_mean"] = _mean(rho, sequences.live, totals)
        metrics["correction_dropped"] = _mean(rho == 0, sequences.live, totals)
    weights = _weights(None, axes, inputs, sequences, totals)
    value = jnp.sum(weights * loss)

    if axes.kl.kl_coef != 0 or inputs.ref_logp is not None:
        estimate = _kl(inputs, axes, log_w, sequences)
        metrics["kl"] = _mean(estimate, sequences.live, totals)
        if axes.kl.kl_coef != 0:
            coef = axes.kl.kl_coef if inputs.kl_coef is None else inputs.kl_coef
            value = value + jnp.sum(_weights(axes.kl.kl_reduce, axes, inputs, sequences, totals) * (coef * estimate))
    coef = axes.entropy.entropy_coef if inputs.entropy_coef is None else inputs.entropy_coef
    if inputs.entropy_coef is not None or axes.entropy.entropy_coef != 0:
        bonus = coef * need(inputs, "entropy", "entropy_coef")
        if axes.entropy.entropy_over == "top" and axes.entropy.top_entropy is not None:
            bonus = bonus * present(selected, "PolicyInputs.selected (top_entropy)")
        value = value - jnp.sum(_weights(axes.entropy.entropy_reduce, axes, inputs, sequences, totals) * bonus)
    if axes.distill.distill_coef != 0:
        divergence = _divergence(inputs, axes.distill, sequences)
        weights = _weights(axes.distill.distill_reduce, axes, inputs, sequences, totals)
        value = value + axes.distill.distill_coef * jnp.sum(weights * divergence)
    if coef := axes.imitation.positive_nll_coef:
        positive = need_extra(inputs, "positive", f"positive_nll_coef {coef}")
        value = value - coef * jnp.sum(_weights("token-mean", axes, inputs, sequences, totals) * positive * inputs.logp)
    return value, {key: stop_gradient(metric) for key, metric in metrics.items()}


def _weights(reduce: Reduce | None, axes: Axes, inputs: PolicyInputs, sequences: Sequences, totals: Totals) -> Array:
    """[B, T] of the aggregation ``reduce``; None: the loss's own."""
    axis = axes.reduce
    name = axis.reduce if reduce is None else reduce
    return reduction_weights(name, inputs, sequences, totals, axis.max_completion_tokens, axis.sequence_count)


def _kept(
    loss: Array, inputs: PolicyInputs, axes: Axes, selected: Array | None, sequences: Sequences
) -> tuple[Array, dict[str, Array]]:
    """The surrogate with 0 where a mask drops it, and for each mask a metric's values [B, T]."""
    metrics = {}
    threshold = axes.correction.off_policy_threshold
    if threshold is not None:
        drifted_from = _logp_of(axes.correction.off_policy_behaviour, inputs)
        keep = off_policy_keep(inputs.logp, drifted_from, inputs.advantages, threshold, sequences)
        loss = loss * keep
        metrics["off_policy_dropped"] = 1.0 - keep
    if axes.correction.reject != "none":
        axis, sampler_logp = axes.correction, need(inputs, "sampler_logp", f"reject {axes.correction.reject}")
        far = rejected(
            inputs.old_logp, sampler_logp, inputs.advantages, axis.reject, axis.reject_min,
            present(axis.reject_max, "reject_max"), sequences,
        )  # fmt: skip
        loss = jnp.where(far, 0.0, loss)
        metrics["rejected_fraction"] = far
    if axes.entropy.top_entropy is not None:
        picked = present(selected, "PolicyInputs.selected (top_entropy)")
        loss = jnp.where(picked > 0, loss, 0.0)
        metrics["selected_fraction"] = picked > 0
    return loss, metrics


def _kl(inputs: PolicyInputs, axes: Axes, log_w: Array, sequences: Sequences) -> Array:
    """[B, T] the estimate of ``axes.kl``; ``log_w`` is of the surrogate's ratio."""
    axis, log_weight = axes.kl, log_w
    if axis.kl_ratio != "surrogate" and axis.kl_estimator.endswith("_unbiased"):
        against = axes.ratio.behaviour if axis.kl_ratio == "token" else axis.kl_ratio
        log_weight = log_ratio(inputs.logp, _logp_of(against, inputs), "token", axes.ratio.log_ratio_clamp, sequences)
    return kl(
        inputs.logp,
        need(inputs, "ref_logp", f"kl_coef {axis.kl_coef}"),
        axis.kl_estimator,
        log_ratio=log_weight,
        log_ratio_clamp=axis.kl_log_ratio_clamp,
        value_clamp=axis.kl_value_clamp,
    )


def _divergence(inputs: PolicyInputs, axis: DistillAxis, sequences: Sequences) -> Array:
    """[B, T] the divergence from the teacher, weighted by the ratio where ``distill_ratio_max`` bounds one."""
    divergence = need(inputs, "teacher_divergence", f"distill_coef {axis.distill_coef}")
    if axis.distill_ratio_max is None:
        return divergence
    w = jnp.exp(log_ratio(inputs.logp, inputs.old_logp, "token", LOG_RATIO_CLAMP, sequences))
    return stop_gradient(jnp.minimum(w, axis.distill_ratio_max)) * divergence


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


def _rho(inputs: PolicyInputs, axis: CorrectionAxis, sequences: Sequences) -> Array | None:
    """[B, T] weights of the correction for the sampler, with its default bounds for those of None; None without one."""
    if axis.correction == "none":
        return None
    low, high = DEFAULT_BOUNDS[axis.correction]
    low = low if axis.correction_min is None else axis.correction_min
    high = high if axis.correction_max is None else axis.correction_max
    sampler_logp = need(inputs, "sampler_logp", f"correction {axis.correction}")
    return sampler_weights(inputs.old_logp, sampler_logp, axis.correction, low, high, sequences)


def adapt_entropy_coef(coef: float, entropy: float, target: float, delta: float = 0.005) -> tuple[float, float]:
    """Skywork-OR1's controller (2505.22312), run by the host once a step.

    The next coefficient is ``coef`` + delta below the target entropy and - delta above it, never negative; the bonus of
    this step uses ``coef`` only while the entropy is at or below the target.

    Returns:
      (the coefficient to use now, the coefficient to carry to the next step).
    """
    carried = coef + delta if entropy < target else coef - delta if entropy > target else coef
    return (coef if entropy <= target else 0.0), max(carried, 0.0)


def adapt_kl_coef(coef: float, kl: float, target: float, gain: float = 0.1) -> float:
    """The next step's coefficient, coef (1 + gain clip(kl / target - 1, -0.2, 0.2)): the controller of 1909.08593 (gain 0.1),
    which verl and TRL's PPO have with gain = samples of a step / horizon. Run by the host once a step."""
    return coef * (1.0 + gain * min(max(kl / target - 1.0, -0.2), 0.2))


def top_entropy_rule(fraction: float) -> Callable[..., Array]:
    """The step-wide rule of ``top_entropy``: tokens of the step / tokens picked on those picked, so that a sum over all of
    them divided by the step's tokens is a mean over the picked ones; 0 elsewhere."""

    def rule(inputs: PolicyInputs, key: Array | None = None) -> Array:
        del key
        picked = top_entropy_tokens(need(inputs, "entropy", "top_entropy"), inputs.mask, fraction)
        return picked * (jnp.sum(inputs.mask > 0, dtype=jnp.float32) / jnp.maximum(jnp.sum(picked), 1.0))

    return rule


def normalize_rule(axis: CorrectionAxis) -> Callable[..., Array]:
    """The step-wide rule of ``correction_normalize``: 1 / the mean of rho."""

    def rule(inputs: PolicyInputs, key: Array | None = None) -> Array:
        del key
        sequences = sequences_of(inputs.mask > 0, inputs.sequence_ids)
        return normalizer(present(_rho(inputs, axis, sequences), "a correction"), axis.correction, sequences)

    return rule


def _logp_of(behaviour: Behaviour, inputs: PolicyInputs) -> Array:
    if behaviour == "policy":
        return stop_gradient(inputs.logp)
    return inputs.old_logp if behaviour == "old" else need(inputs, "sampler_logp", "behaviour sampler")


def _mean(values: Array, live: Array, totals: Totals) -> Array:
    """This batch's contribution to the mean over the step's tokens."""
    total = jnp.sum(jnp.where(live, values.astype(jnp.float32), 0.0))
    return total / jnp.maximum(totals.tokens, 1.0)


def shared_metrics(inputs: PolicyInputs) -> Metrics:
    """What a policy is watched by whatever its loss: ``ratio_*`` and ``policy_kl`` of the token ratio, ``entropy``,
    ``teacher_divergence``, ``sampler_gap``, ``sampler_gap_max`` and ``kl`` (k3), each where its inputs are there."""
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
    found = {
        name: _mean(value, live, totals)
        for name, value in (("entropy", inputs.entropy), ("teacher_divergence", inputs.teacher_divergence))
        if value is not None
    }
    if inputs.sampler_logp is not None:
        gap = jnp.abs(inputs.old_logp - inputs.sampler_logp)
        found |= {"sampler_gap": _mean(gap, live, totals), "sampler_gap_max": jnp.max(jnp.where(live, gap, 0.0))}
    return found
