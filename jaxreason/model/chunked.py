"""Functions of whole logits, of one model or of two side by side, over chunks of tokens: never a [B, T, V] array.

The backward pass computes a chunk's logits again, so between the passes only hidden states are kept.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jaxreason.model.placement import row_axes
from jaxreason.model.vocab import chunk_of, logits_of

Head = tuple[Array, Array]  # hidden states [B, T, D] in the compute dtype, table [V, D]


def from_logits(function: Callable[..., Any], targets: Array, heads: tuple[Head, ...], budget: int = 2**25) -> Any:
    """``function(targets [n], logits [n, V] of each head) -> tree of [n]`` for all tokens, as a tree of [B, T].

    Args:
      targets: [B, T] int32.
      heads: models of one vocabulary; hidden sizes may differ. Differentiable in all of them.
      budget: elements of one head's largest logits tile.
    """
    xs, tables = zip(*heads)
    flat = [x.reshape(-1, x.shape[-1]) for x in xs]
    axes = row_axes(targets.size)
    if axes is None:
        found = _walk(function, targets.reshape(-1), flat, tables, budget)
    else:
        # Each device walks its own tokens; the partitioner would walk all devices through the same chunks.
        rows, whole = PartitionSpec(axes), PartitionSpec()
        walk = jax.shard_map(
            lambda y, x, w: _walk(function, y, x, w, budget), mesh=jax.sharding.get_abstract_mesh(),
            in_specs=(rows, rows, whole), out_specs=rows, axis_names=set(axes), check_vma=False,
        )  # fmt: skip
        found = walk(targets.reshape(-1), flat, tables)
    return jax.tree.map(lambda a: a.reshape(targets.shape), found)


def _walk(function: Callable, targets: Array, xs: Sequence[Array], tables: Sequence[Array], budget: int) -> Any:
    size = targets.shape[0]
    chunk, pad = chunk_of(size, max(table.shape[0] for table in tables), budget)

    @jax.checkpoint
    def one(piece: tuple[Array, Sequence[Array]]) -> Any:
        y, parts = piece
        # Cast within the chunk, so that the tables' gradients add up in their own dtype.
        return function(y, *(logits_of(x, table.astype(x.dtype), 1.0) for x, table in zip(parts, tables)))

    if chunk == size:
        return one((targets, xs))
    split = lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])  # noqa: E731
    found = lax.map(one, jax.tree.map(split, (targets, xs)))
    return jax.tree.map(lambda a: a.reshape(-1)[:size], found)
