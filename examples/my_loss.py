"""A loss of your own: one file, one function, no edit in jaxreason.

Train with it:

    python scripts/train.py --config grpo loss.name=examples/my_loss.py:soft_clip loss.options.width=0.3

``loss.name`` takes a path or an import path (``my_package.my_file:my_loss``). The function gets per-token arrays [B, T]
and returns a scalar and a dict of scalars. Three habits make it correct in every setting; at start-up jaxreason checks
them on a tiny batch and says which one is broken:

1. ``losses.clean`` first: masked positions may hold anything, and this puts 0 there before any ``exp``.
2. Sum over tokens, with weights whose denominators are ``totals``, the counts of the whole optimizer step. Then neither
   microbatches nor devices can change the result. ``losses.reduction_weights`` knows the usual aggregations.
3. Metrics are sums over totals too; a key ending in ``_max`` or ``_min`` is combined by maximum or minimum.
"""

import jax.numpy as jnp

from jaxreason import losses


@losses.loss(kind="policy", advantage="center")
def soft_clip(inputs: losses.PolicyInputs, width: float = 0.2, reduce: str = "token-mean"):
    """-width tanh((w - 1) / width) A: a ratio that saturates smoothly instead of being cut at 1 +- width.

    Its slope is 1 at w = 1, as GRPO's, and never quite 0.
    """
    inputs, sequences = losses.clean(inputs)
    totals = losses.totals_of(inputs, sequences)
    ratio = jnp.exp(jnp.clip(inputs.logp - inputs.old_logp, -20.0, 20.0))
    loss = -width * jnp.tanh((ratio - 1.0) / width) * inputs.advantages
    weights = losses.reduction_weights(reduce, inputs, sequences, totals)
    saturated = sequences.live & (jnp.abs(ratio - 1.0) > width)
    return jnp.sum(weights * loss), {"saturated_fraction": jnp.sum(saturated, dtype=jnp.float32) / totals.tokens}
