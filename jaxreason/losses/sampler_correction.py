"""Weights that correct for a sampler that is not quite the policy, and masks that drop sequences or tokens.

rho = pi_old / pi_sampler, both at the rollout's parameters: 1 if sampler and trainer compute the same numbers. All
results are detached weights [B, T] that multiply the policy term (not the KL term).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxreason.errors import UserError
from jaxreason.losses.axes import LOG_RATIO_CLAMP, Correction, Reject
from jaxreason.losses.segments import Sequences, sequence_counts, sequence_max, sequence_mean, sequence_sum

BY_SEQUENCE = ("tis_sequence", "tis_geometric", "mis", "geo_rs")  # one rho for all tokens of a sequence

# (min, max) where the literature or its code states them.
DEFAULT_BOUNDS = {
    "none": (None, None),
    "tis": (None, 2.0),
    "tis_sequence": (None, 2.0),
    "tis_geometric": (None, 2.0),
    "icepop": (0.5, 5.0),
    "mis": (0.5, 2.0),
    "seq_mask_tis": (0.999, 1.002),  # NeMo-RL's example
    "geo_rs": (0.99, 1.01),  # no paper states them
}


def sampler_weights(
    old_logp: Array,
    sampler_logp: Array,
    kind: Correction,
    minimum: float | None,
    maximum: float | None,
    sequences: Sequences,
) -> Array:
    """[B, T] weights:

    - ``tis``: min(rho_t, max), truncated importance sampling; ``tis_sequence``: of prod_t rho_t; ``tis_geometric``: of
      exp(mean_t log rho_t).
    - ``icepop``: rho_t where min <= rho_t <= max, else 0.
    - ``mis``: prod_t rho_t where it lies in [min, max], else 0, for the whole sequence.
    - ``seq_mask_tis``: rho_t where exp(mean_t log rho_t) lies in [min, max], else 0, for the whole sequence.
    - ``geo_rs``: 1 where exp(mean_t log rho_t) lies in [min, max], else 0: rejection without weighting.

    A bound of None does not bind.
    """
    log_rho = stop_gradient(old_logp - sampler_logp)
    judged = log_rho
    if kind in ("tis_sequence", "mis"):
        judged = sequence_sum(log_rho, sequences)
    elif kind in ("tis_geometric", "seq_mask_tis", "geo_rs"):
        judged = sequence_mean(log_rho, sequences)
    # float32 exp overflows at 88; no bound anybody sets is near e^60.
    judged, rho = (jnp.exp(jnp.clip(x, -60.0, 60.0)) for x in (judged, log_rho))
    if kind in ("tis", "tis_sequence", "tis_geometric"):
        return jnp.clip(judged, minimum, maximum)
    inside = jnp.ones(rho.shape, bool)
    if minimum is not None:
        inside &= judged >= minimum
    if maximum is not None:
        inside &= judged <= maximum
    return jnp.where(inside, {"seq_mask_tis": rho, "geo_rs": jnp.ones_like(rho)}.get(kind, judged), 0.0)


def normalizer(weights: Array, kind: Correction, sequences: Sequences) -> Array:
    """[B, T] 1 / the mean of ``weights`` (those of ``sampler_weights``, of the whole step): over supervised tokens or, where a
    sequence shares one, over sequences. 1 where the mean is not above 1e-8. As verl's ``rollout_is_batch_normalize``."""
    counts = 1.0 / jnp.maximum(sequence_counts(sequences), 1.0) if kind in BY_SEQUENCE else jnp.ones(weights.shape)
    counts = jnp.where(sequences.live, counts, 0.0)
    mean = jnp.sum(counts * weights) / jnp.maximum(jnp.sum(counts), 1e-8)
    return jnp.where(sequences.live, jnp.where(mean > 1e-8, 1.0 / jnp.maximum(mean, 1e-8), 1.0), 0.0)


def rejected(
    old_logp: Array,
    sampler_logp: Array,
    advantages: Array,
    kind: Reject,
    minimum: float | None,
    maximum: float,
    sequences: Sequences,
) -> Array:
    """[B, T] bool: tokens that are dropped because sampler and trainer differ too much there, with l = log rho_t.

    - ``token_k1``: -l outside [log min, log max]; min of None: 1 / max. ``token_k2``: l^2 / 2 > max. ``token_k3``:
      e^l - 1 - l > max.
    - ``seq_sum_*``, ``seq_mean_*``, ``seq_max_*``: the same of the sum, the mean, the maximum of these over a sequence, all of
      which is then dropped. These are verl's ``rollout_rs``.
    - ``seq_tv``: mean_t |rho_t - 1| > max, and of such a sequence only tokens with A l > 0, which an update would drive still
      further from the sampler: VACO's filter (2603.01365) as open-instruct has it (``rho_mask_tv_divergence``).
    """
    log_rho = jnp.clip(stop_gradient(old_logp - sampler_logp), -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    if kind == "seq_tv":
        apart = sequence_mean(jnp.abs(jnp.expm1(log_rho)), sequences)
        return (apart > maximum) & (jnp.sign(log_rho) * advantages > 0) & sequences.live
    level, _, form = kind.rpartition("_")
    measured = {"k1": -log_rho, "k2": 0.5 * jnp.square(log_rho), "k3": jnp.expm1(log_rho) - log_rho}[form]
    over = {"seq_sum": sequence_sum, "seq_mean": sequence_mean, "seq_max": sequence_max}
    measured = over[level](measured, sequences) if level in over else measured
    if form != "k1":
        return (measured > maximum) & sequences.live
    low = -math.log(maximum) if minimum is None else math.log(minimum)
    return ((measured < low) | (measured > math.log(maximum))) & sequences.live


def off_policy_keep(
    logp: Array, behaviour_logp: Array, advantages: Array, threshold: float, sequences: Sequences
) -> Array:
    """[B, T] 0 where A < 0 and mean_t(log pi_behaviour - log pi_theta) > threshold, else 1. OPSM (DeepSeek-V3.2)."""
    drift = stop_gradient(sequence_mean(behaviour_logp - logp, sequences))
    return ((advantages >= 0) | (drift <= threshold)).astype(jnp.float32)


def check_bounds(options: Mapping[str, Any]) -> None:
    """Raises UserError for an empty interval, and for a bound or a normalization that nothing reads, or that is missing."""
    kind, reject = options["correction"], options["reject"]
    bounds = {name: (options[f"{name}_min"], options[f"{name}_max"]) for name in ("correction", "reject")}
    if kind == "none" and bounds["correction"] != (None, None):
        raise UserError("correction_min and correction_max do nothing with correction none; choose a correction")
    if kind == "none" and options["correction_normalize"] != "none":
        raise UserError("correction_normalize does nothing with correction none; choose a correction")
    if reject == "none" and bounds["reject"] != (None, None):
        raise UserError("reject_min and reject_max do nothing with reject none; choose what is measured, such as seq_mean_k3")
    if reject != "none" and bounds["reject"][1] is None:
        raise UserError(f"reject {reject} compares with a bound: set reject_max")
    if bounds["reject"][0] is not None and not reject.endswith("_k1"):
        raise UserError(f"reject {reject} has no lower bound: leave out reject_min")
    for name, (low, high) in bounds.items():
        if low is not None and high is not None and low > high:
            raise UserError(f"{name}_min {low} is above {name}_max {high}")
    if reject.endswith("_k1") and bounds["reject"][0] is None and bounds["reject"][1] < 1:
        raise UserError(f"reject_max {bounds['reject'][1]} is below 1, and without reject_min its reciprocal is the lower bound")
