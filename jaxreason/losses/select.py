"""Rules that pick tokens over the whole optimizer step.
 A quantile or a mean over a microbatch is not that of the step, so a loss that used one would depend on the split.
These rules therefore run once a step, on the rollout's policy (``logp`` = ``old_logp``), and their result [B, T]
travels with the rows as ``PolicyInputs.selected``. Only where the batch is the whole step does the loss call them
itself.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient


def top_entropy_tokens(entropy: Array, mask: Array, fraction: float) -> Array:
    """[B, T] float32: 1 on the ``fraction`` of tokens with the highest entropy (ties are kept). 80/20 rule, 2506.01939.

    Kept: H >= the (1 - fraction) quantile over the supervised tokens, interpolated linearly.
    """
    live = mask > 0
    values = stop_gradient(jnp.where(live, entropy, jnp.nan))
    threshold = jnp.nanquantile(values, 1.0 - fraction)
    return (live & (entropy >= threshold)).astype(jnp.float32)


def covariance(advantages: Array, logp: Array, mask: Array) -> Array:
    """[B, T] (A_t - mean A) (log pi_t - mean log pi), means over the supervised tokens; 0 elsewhere. 2505.22617."""
    live = mask > 0
    count = jnp.maximum(jnp.sum(live, dtype=jnp.float32), 1.0)

    def centred(values: Array) -> Array:
        values = stop_gradient(jnp.where(live, values, 0.0))
        return jnp.where(live, values - jnp.sum(values) / count, 0.0)

    return centred(advantages) * centred(logp)


def random_in_band(cov: Array, mask: Array, low: float, high: float, fraction: float, key: Array) -> Array:
    """[B, T] float32: 1 on random tokens with covariance in (low, high), ``fraction`` of all tokens (rounded down, at
    least one), or all of the band if it holds fewer. Clip-Cov, 2505.22617."""
    live = mask > 0
    band = live & (cov > low) & (cov < high)
    return _largest(jax.random.uniform(key, cov.shape), band, _count(fraction, live))


def largest_covariance(cov: Array, mask: Array, fraction: float) -> Array:
    """[B, T] float32: 1 on the ``fraction`` of tokens (rounded down, at least one) with the largest covariance. KL-Cov,
    2505.22617."""
    live = mask > 0
    return _largest(cov, live, _count(fraction, live))


def _count(fraction: float, live: Array) -> Array:
    # A float32 product of a whole number may fall just below it.
    return jnp.maximum(jnp.floor(fraction * jnp.sum(live, dtype=jnp.float32) + 1e-4), 1.0)


def _largest(scores: Array, allowed: Array, count: Array) -> Array:
    """1 on the ``count`` allowed positions of largest score, ties in order of position."""
    flat = jnp.where(allowed, scores, -jnp.inf).reshape(-1)
    rank = jnp.zeros(flat.shape, jnp.float32).at[jnp.argsort(-flat)].set(jnp.arange(flat.size, dtype=jnp.float32))
    return ((rank < count) & allowed.reshape(-1)).astype(jnp.float32).reshape(scores.shape)
