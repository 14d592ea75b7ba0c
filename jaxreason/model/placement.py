"""Which mesh axes the model's arrays are split over, where the compiler would not find the best split by itself.

Parameters are split on their embedding axis over ``fsdp``, and so is what is looked up in them. Left alone, the
partitioner carries that split on into the residual stream: it then sums partial logits over devices instead of
gathering the table once. So the head is walked by each device over its own rows (``vocab.py``), and rows are pinned to
devices where they enter, and leave, a layer: jax 0.10.2 would put them there by itself on an fsdp mesh (compiled both
ways), which the pin says instead of hoping for. Without a mesh in context
(``jax.set_mesh``), or with one device, nothing here does anything.
"""

import math

import jax
from jax import Array
from jax.sharding import PartitionSpec

from jaxreason.types import BATCH_AXES

SHARD_AXIS, HEAD_AXIS = "fsdp", "tensor"


def row_axes(rows: int) -> tuple[str, ...] | None:
    """The mesh axes that ``rows`` rows are split over; None if they are on one device, or cannot be split evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.shape):
        return None
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return BATCH_AXES if ways > 1 and rows % ways == 0 else None


def row_ways(rows: int) -> int:
    """Devices that :func:`row_axes` splits ``rows`` rows over."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in row_axes(rows) or ())


def head_axis(heads: int) -> str | None:
    """The mesh axis that ``heads`` heads are split over."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(HEAD_AXIS, 1) == 1 or heads % mesh.shape[HEAD_AXIS]:
        return None
    return HEAD_AXIS


def pin_rows(x: Array, rows: int) -> Array:
    """``x`` [rows·n, …] with its rows on the devices that own them and every other axis whole."""
    axes = row_axes(rows)
    return x if axes is None else jax.lax.with_sharding_constraint(x, PartitionSpec(axes))
