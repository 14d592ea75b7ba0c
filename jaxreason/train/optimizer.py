"""AdamW (arXiv 1711.05101) with decay mask, schedule, global-norm clip and a choice of storage, from optax.

What is stored in bfloat16, moments or parameters, is rounded stochastically: with 8 bits of mantissa, rounding to nearest
loses every change below 1/512 of a value, so that a second moment with b2 = 0.999 stays where it is and parameters do not
move at a small learning rate. A value between two neighbours goes to each with the probability that makes the mean exact.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import DTypeLike

from jaxreason import config as cfg

_MOMENTS, _PARAMS = 1, 2  # keep the draws of the two kinds of rounding apart


def schedule(optimizer: cfg.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of update k = 0 … steps−1.

    Warm-up of w steps gives rate·(k+1)/w, so that no update has rate 0; then, with x = (k−w)/(steps−w),
    constant: rate; linear: rate·(1 − x·(1−final)); cosine: rate·(final + (1−final)·(1+cos πx)/2).
    """
    warmup = optimizer.warmup_steps or round(optimizer.warmup_fraction * steps)
    rate, final = optimizer.learning_rate, optimizer.final_fraction

    def at(count: Array | int) -> Array:
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


def decays(params: Any) -> Any:
    """True for the leaves that weight decay applies to: all matrices, embedding and head included; not norms or biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias", "magnitude"), params)


def stochastic_round(x: Array, words: Array) -> Array:
    """``x`` float32 as bfloat16, rounded up or down with the probabilities that make the expectation ``x``.

    A bfloat16 is the upper half of a float32: 16 random bits are added to the lower half and its carry decides. The bits
    are a hash of the element's index and of ``words`` [2] uint32, not ``jax.random.bits``: they are a dozen integer
    operations that fuse into the update (threefry takes a hundred), and an iota is the same however it is sharded, so the
    result is too. Infinities and NaN stay what they are.
    """
    index = jnp.zeros(x.shape, jnp.uint32)  # counts modulo 2^32: elements that far apart may share their bits
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        index += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    noise = _mixed(_mixed(index ^ words[0]) ^ words[1]) >> 16
    carried = (lax.bitcast_convert_type(x, jnp.uint32) + noise) >> 16
    rounded = lax.bitcast_convert_type(carried.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _mixed(x: Array) -> Array:
    """A bijection of uint32 that changes half of the bits for any change of one (multiply and shift, Wellons 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _words(seed: int, count: Array, kind: int, leaves: int) -> Array:
    """[leaves, 2] uint32: what the rounding of every leaf is drawn from after ``count`` updates."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), kind), count)
    return jax.random.bits(key, (leaves, 2), jnp.uint32)


def stored_as(inner: optax.GradientTransformation, dtype: str, seed: int = 0) -> optax.GradientTransformation:
    """``inner`` with its floating state kept in ``dtype`` between updates; its arithmetic stays float32.

    ``inner``'s state has a ``count`` of updates, from which and from ``seed`` the rounding to bfloat16 is drawn.
    """

    def cast(state: Any, to: DTypeLike) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def rounded(state: Any) -> Any:
        leaves, tree = jax.tree.flatten(state)
        words = _words(seed, state.count, _MOMENTS, len(leaves))
        stored = [stochastic_round(x, w) if x.dtype == jnp.float32 else x for x, w in zip(leaves, words)]
        return jax.tree.unflatten(tree, stored)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, state if dtype == "float32" else rounded(state)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def of_run(config: cfg.RunConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of ``steps`` updates (:func:`make`)."""
    return make(config.optimizer, steps, config.run.seed, config.lora.learning_rate_ratio)


def make(optimizer: cfg.Optimizer, steps: int, seed: int = 0, b_ratio: float = 1.0) -> optax.GradientTransformation:
    """Clip → Adam → decoupled decay → −rate. Gradients arrive in float32; parameters may be stored in less.

    ``steps``: optimizer updates of the whole run, for the schedule; ``seed``: of the rounding of bfloat16 moments; ``b_ratio``:
    learning rate of the adapters' B over that of everything else (LoRA+, arXiv 2402.12354).
    """
    parts = []
    if optimizer.max_grad_norm is not None:
        parts.append(optax.clip_by_global_norm(optimizer.max_grad_norm))
    adam = optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps)
    parts.append(stored_as(adam, optimizer.moment_dtype, seed))
    if optimizer.weight_decay:
        parts.append(optax.add_decayed_weights(optimizer.weight_decay, mask=decays))
    parts.append(optax.scale_by_learning_rate(schedule(optimizer, steps)))
    if b_ratio != 1.0:
        parts.append(optax.stateless(lambda updates, _: _scaled_b(updates, b_ratio)))
    return optax.chain(*parts)


def _scaled_b(updates: Any, ratio: float) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, u: u * ratio if path[-1].key == "lora_b" else u, updates)


def apply(params: Any, updates: Any, step: Array | int, seed: int = 0) -> Any:
    """Parameters after update number ``step``: the float32 sum, rounded stochastically where they are bfloat16.

    The rounding is drawn from ``seed`` and ``step`` alone. float32 parameters are exactly ``optax.apply_updates``.
    """
    leaves, tree = jax.tree.flatten(params)
    words = _words(seed, jnp.asarray(step), _PARAMS, len(leaves))

    def moved(p: Array, u: Array, w: Array) -> Array:
        if p.dtype != jnp.bfloat16:
            return optax.apply_updates(p, u)
        return stochastic_round(p.astype(jnp.float32) + u.astype(jnp.float32), w)

    return jax.tree.unflatten(tree, [moved(p, u, w) for p, u, w in zip(leaves, jax.tree.leaves(updates), words)])


def chosen(usable: Array, new: Any, old: Any) -> Any:
    """``new`` where ``usable`` [] is true, else ``old`` bit for bit; the schedule's place is always the new one."""

    def one(was: Any, now: Any) -> Any:
        return now if isinstance(now, optax.ScaleByScheduleState) else jnp.where(usable, now, was)

    return jax.tree.map(one, old, new, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
