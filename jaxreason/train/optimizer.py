"""AdamW (arXiv 1711.05101) with decay mask, schedule, global-norm clip and a choice of moment storage, from optax."""

import jax
import jax.numpy as jnp
import optax

from jaxreason import config as cfg


def schedule(optimizer: cfg.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of update k = 0 … steps−1.

    Warm-up of w steps gives rate·(k+1)/w, so that no update has rate 0; then, with x = (k−w)/(steps−w),
    constant: rate; linear: rate·(1 − x·(1−final)); cosine: rate·(final + (1−final)·(1+cos πx)/2).
    """
    warmup = optimizer.warmup_steps or round(optimizer.warmup_fraction * steps)
    rate, final = optimizer.learning_rate, optimizer.final_fraction

    def at(count):
        k = jnp.asarray(count, jnp.float32)
        x = jnp.clip((k - warmup) / max(1, steps - warmup), 0.0, 1.0)
        if optimizer.schedule == "constant":
            shape = jnp.ones_like(x)
        elif optimizer.schedule == "linear":
            shape = 1.0 - x * (1.0 - final)
        else:
            shape = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * x))
        return rate * jnp.where(k < warmup, (k + 1.0) / max(1, warmup), shape)

    return at


def decays(params) -> dict:
    """True for the leaves that weight decay applies to: matrices, not norms or biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def stored_as(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """``inner`` with its floating state kept in ``dtype`` between updates; its arithmetic stays float32."""

    def cast(state, to):
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def make(optimizer: cfg.Optimizer, steps: int) -> optax.GradientTransformation:
    """Clip → Adam → decoupled decay → −rate. Gradients arrive in float32; parameters may be stored in less."""
    parts = []
    if optimizer.max_grad_norm is not None:
        parts.append(optax.clip_by_global_norm(optimizer.max_grad_norm))
    adam = optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)
    parts.append(stored_as(adam, optimizer.moment_dtype))
    if optimizer.weight_decay:
        parts.append(optax.add_decayed_weights(optimizer.weight_decay, mask=decays))
    parts.append(optax.scale_by_learning_rate(schedule(optimizer, steps)))
    return optax.chain(*parts)
