"""How much a loss moves one token, by how far the policy has moved already: the curve that explains a loss."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreason.losses import Loss, PolicyInputs
from jaxreason.types import Totals

LOG_RATIOS = np.linspace(-2.0, 2.0, 161, dtype=np.float32)
_OLD_LOGP = -2.5  # of the token: low enough that no log-ratio above makes it a probability beyond 1
_ENTROPY = 1.0  # nats


def weight_curve(loss: Loss, extras: Mapping[str, float]) -> dict[str, list[float | None]]:
    """−∂L/∂logp of a completion of one token with A = +1 (``positive``) and A = −1 (``negative``), over ``LOG_RATIOS``.

    Divided by its size at ratio 1 and A = +1, so that 1 is the weight of REINFORCE; by its largest where that is 0. In a
    completion of one token the ratios of token and sequence are one, so the log-ratio is that of the loss's own level.
    Reference and sampler are the old policy, and a teacher agrees with it. A rule that picks tokens by entropy picks this one,
    one that picks by covariance does not. None where it is not finite.

    Args:
      extras: a value for every extra that the loss reads.
    """

    def one(log_ratio: Array, advantage: Array) -> Array:
        def value(logp: Array) -> Array:
            return loss(_inputs(loss, logp, advantage, extras))[0]

        return -jax.grad(value)(jnp.full((1, 1), _OLD_LOGP) + log_ratio)[0, 0]

    found = np.asarray(jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(LOG_RATIOS, jnp.array([1.0, -1.0])))
    positive, negative = found
    sizes = [abs(positive[len(LOG_RATIOS) // 2]), np.max(np.abs(found), initial=0.0, where=np.isfinite(found))]
    scale = next((size for size in sizes if np.isfinite(size) and size > 0), 1.0)
    return {
        name: [float(f"{w:.4g}") if np.isfinite(w) else None for w in weights / scale]
        for name, weights in (("positive", positive), ("negative", negative))
    }


def _inputs(loss: Loss, logp: Array, advantage: Array, extras: Mapping[str, float]) -> PolicyInputs:
    def whole(value: float | Array) -> Array:
        return jnp.full((1, 1), value, jnp.float32)

    old, ids, one = whole(_OLD_LOGP), jnp.zeros((1, 1), jnp.int32), jnp.float32(1.0)
    return PolicyInputs(
        logp, old, whole(advantage), whole(1.0), ref_logp=old, sampler_logp=old, entropy=whole(_ENTROPY), sequence_ids=ids,
        group_ids=ids, totals=Totals(one, one, one, one), group_tokens=whole(1.0),
        teacher_divergence=whole(0.0),
        selected=whole(0.0 if loss.options.get("top_entropy") is None else 1.0),
        extras={name: whole(value) for name, value in extras.items()},
    )  # fmt: skip
