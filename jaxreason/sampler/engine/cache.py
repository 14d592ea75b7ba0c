"""KV buffers of the decoding slots: how long they are, how they grow, and how new entries get in.

Entry c of a slot holds position c of its sequence, so a prompt and its completion stand side by side from 0. The
attended length is the buffer's length: buffers are as long as the longest live sequence needs and no longer.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from jaxreason.model import ModelConfig
from jaxreason.sampler.engine.spread import AXIS, SPLIT, over, placed

Caches = list[tuple[Array, Array]]  # per layer k and v, each [slots, K, C, H]

_SHORTEST = 64
_SHORTEST_PROMPT = 16  # a prefill pays for padding in full, decoding next to nothing


def bucket(length: int, limit: int) -> int:
    """Buffer length for ``length`` positions: 64·2^n, or ``limit`` where that is less, so that compiles stay few."""
    return _double(_SHORTEST, length, limit)


def prompt_bucket(length: int, limit: int) -> int:
    """Padded length of a prefill call: 16·2^n, or ``limit`` where that is less."""
    return _double(_SHORTEST_PROMPT, length, limit)


def _double(size: int, length: int, limit: int) -> int:
    while size < length:
        size *= 2
    return min(size, limit)


def longest(length: int) -> int:
    """The limit for sequences of at most ``length``: the next multiple of a quarter of the power of two below it.

    Doubling to the end could waste half of the memory; this wastes a fifth at most, and calls whose longest
    sequences differ a little still share their compiled functions.
    """
    step = _SHORTEST
    while step * 8 <= length:
        step *= 2
    return -(-length // step) * step


def allocate(config: ModelConfig, slots: int, length: int, mesh: Mesh | None = None) -> Caches:
    """Empty buffers."""
    c, place = config.arch, placed(mesh)
    shape, dtype = (slots, c.num_kv_heads, length, c.head_dim), config.execution.compute_dtype

    def empty() -> Array:
        return jnp.zeros(shape, dtype, device=place)

    return [(empty(), empty()) for _ in range(c.num_layers)]


def num_bytes(config: ModelConfig, slots: int, length: int) -> int:
    """Bytes of ``slots`` buffers of ``length`` positions over all layers."""
    c = config.arch
    entry = 2 * c.num_kv_heads * c.head_dim * np.dtype(jnp.dtype(config.execution.compute_dtype)).itemsize
    return c.num_layers * slots * length * entry


@functools.partial(jax.jit, static_argnums=(1, 2))
def _resize_one(buffer: Array, length: int, mesh: Mesh | None) -> Array:
    def resized(buffer: Array) -> Array:
        grow = length - buffer.shape[2]
        return jnp.pad(buffer, ((0, 0), (0, 0), (0, grow), (0, 0))) if grow > 0 else buffer[:, :, :length]

    return over(mesh, resized, SPLIT, SPLIT)(buffer)


def resize(caches: Caches, length: int, mesh: Mesh | None = None) -> Caches:
    """The same entries in buffers of another length. Empties ``caches``: old and new coexist for one layer only."""
    if caches[0][0].shape[2] == length:
        return caches
    resized = []
    while caches:
        k, v = caches.pop(0)
        resized.append((_resize_one(k, length, mesh), _resize_one(v, length, mesh)))
    return resized


@functools.partial(jax.jit, static_argnums=2)
def _take_one(buffer: Array, places: Array, mesh: Mesh | None) -> Array:
    return over(mesh, lambda buffer, places: buffer[places], (SPLIT, SPLIT), SPLIT)(buffer, places)


def take(caches: Caches, places: Array | np.ndarray, mesh: Mesh | None = None) -> Caches:
    """The slots at ``places``, which count from 0 on every device, as the only ones. Empties ``caches``."""
    taken = []
    while caches:
        k, v = caches.pop(0)
        taken.append((_take_one(k, places, mesh), _take_one(v, places, mesh)))
    return taken


def write_at(positions: Array) -> Callable[[tuple[Array, Array], Array, Array], tuple[Array, Array]]:
    """``write`` of :func:`jaxreason.model.step_cached` for one new token a slot, at positions [slots]."""

    def write(cache: tuple[Array, Array], k: Array, v: Array) -> tuple[Array, Array]:
        slots = jnp.arange(positions.shape[0])

        def written(buffer: Array, new: Array) -> Array:
            return buffer.at[slots, :, positions].set(new[:, 0], unique_indices=True, mode="drop")

        return written(cache[0], k), written(cache[1], v)

    return write


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _copy_one(buffer: Array, prompts: Array, new: Array, rows: Array, mesh: Mesh | None) -> Array:
    def copied(buffer: Array, prompts: Array, new: Array, rows: Array) -> Array:
        if mesh is not None:  # a prompt may be wanted on another device than the one that computed it
            prompts = lax.all_gather(prompts, AXIS, tiled=True)
        # A batch may hold a longer prompt than those that are copied now, which fit into the buffer.
        length, slots = min(prompts.shape[2], buffer.shape[2]), jnp.arange(buffer.shape[0])
        where = jnp.where(new, slots, slots + buffer.shape[0])
        return buffer.at[where, :, :length].set(prompts[rows, :, :length], unique_indices=True, mode="drop")

    return over(mesh, copied, (SPLIT,) * 4, SPLIT)(buffer, prompts, new, rows)


def copy_rows(
    caches: Caches, prompts: Caches, new: Array | np.ndarray, rows: Array | np.ndarray, mesh: Mesh | None = None
) -> Caches:
    """Puts row ``rows[i]`` of the prompts' entries [R, K, S, H] into every slot i that is ``new``; both are [N].

    The buffers in ``caches`` are donated. Compiled for one buffer, not for all layers: there is a variant for every
    pair of lengths, and over several devices only one buffer's prompts are on all of them at a time.
    """

    def copied(buffer: Array, prompt: Array) -> Array:
        return _copy_one(buffer, prompt, new, rows, mesh)

    return [(copied(k, new_k), copied(v, new_v)) for (k, v), (new_k, new_v) in zip(caches, prompts)]
