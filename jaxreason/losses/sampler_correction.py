"""Weights that correct for a sampler that is not quite the policy, and masks that drop sequences or tokens.

rho = pi_old / pi_sampler, both at the rollout's parameters: 1 if sampler and trainer compute the same numbers. All
results are detached weights [B, T] that multiply the policy term (not the KL term).
"""

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxreason.errors import UserError
from jaxreason.losses.axes import Correction
from jaxreason.losses.segments import Sequences, sequence_mean, sequence_sum

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


def off_policy_keep(
    logp: Array, behaviour_logp: Array, advantages: Array, threshold: float, sequences: Sequences
) -> Array:
    """[B, T] 0 where A < 0 and mean_t(log pi_behaviour - log pi_theta) > threshold, else 1. OPSM (DeepSeek-V3.2)."""
    drift = stop_gradient(sequence_mean(behaviour_logp - logp, sequences))
    return ((advantages >= 0) | (drift <= threshold)).astype(jnp.float32)


def check_bounds(kind: str, minimum: float | None, maximum: float | None) -> None:
    """Raises UserError for an empty interval or a bound that the correction does not read."""
    if kind == "none" and (minimum is not None or maximum is not None):
        raise UserError("correction_min and correction_max do nothing with correction none; choose a correction")
    if minimum is not None and maximum is not None and minimum > maximum:
        raise UserError(f"correction_min {minimum} is above correction_max {maximum}")
