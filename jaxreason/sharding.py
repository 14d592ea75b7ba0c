"""The mesh and the one table of which axis of which array is split over it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.types import BATCH_AXES

_PAIRS = ("lora", "start")  # adapters, and where PiSSA's began

# Parameter name → how its axes are split. Output channels of q, k, v, gate and up go over `tensor` and those of o and
# down come back from it, so a block needs one all-reduce each for attention and mlp; `fsdp` splits the other axis.
RULES: dict[str, PartitionSpec] = {
    "embedding": PartitionSpec("tensor", "fsdp"),
    "head": PartitionSpec("tensor", "fsdp"),
    **{f"{name}.kernel": PartitionSpec(None, "fsdp", "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"{name}.bias": PartitionSpec(None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"{name}.kernel": PartitionSpec(None, "tensor", "fsdp") for name in ("o", "down")},
    **{f"{name}.bias": PartitionSpec(None, "fsdp") for name in ("o", "down")},
    "scale": PartitionSpec(),
    # Adapters: A is split as the kernel's inputs, B as its outputs; the rank is whole everywhere.
    **{f"{name}.{kind}_a": PartitionSpec(None, "fsdp", None) for name in ("q", "k", "v", "gate", "up") for kind in _PAIRS},
    **{f"{name}.{kind}_b": PartitionSpec(None, None, "tensor") for name in ("q", "k", "v", "gate", "up") for kind in _PAIRS},
    **{f"{name}.{kind}_a": PartitionSpec(None, "tensor", None) for name in ("o", "down") for kind in _PAIRS},
    **{f"{name}.{kind}_b": PartitionSpec(None, None, "fsdp") for name in ("o", "down") for kind in _PAIRS},
    **{f"{table}_lora.lora_a": PartitionSpec(None, "fsdp") for table in ("embedding", "head")},
    **{f"{table}_lora.lora_b": PartitionSpec("tensor", None) for table in ("embedding", "head")},
    **{f"{name}.magnitude": PartitionSpec(None, "tensor") for name in ("q", "k", "v", "gate", "up")},
    **{f"{name}.magnitude": PartitionSpec(None, "fsdp") for name in ("o", "down")},
}


def make_mesh(mesh: cfg.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes data, fsdp, tensor over all devices; a size of -1 takes what the others leave."""
    devices = jax.devices() if devices is None else devices
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    fixed = math.prod(size for size in sizes.values() if size > 0)
    found = len(devices)
    if -1 in sizes.values():
        if found % fixed:
            raise UserError(f"mesh {sizes}: {found} devices are not a multiple of {fixed}; change mesh.* or the devices")
        sizes = {name: found // fixed if size == -1 else size for name, size in sizes.items()}
    elif fixed != found:
        raise UserError(f"mesh {sizes} needs {fixed} devices and {found} are here; set one mesh axis to -1")
    grid = np.asarray(devices).reshape(*sizes.values())
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rule(path: tuple[str, ...]) -> PartitionSpec | None:
    """The rule of the leaf at ``path``: of its last two names (``q.kernel``), else of its last (``scale``); None: it has none.

    The leaves that a quantized kernel is kept as have its axes, in steps of a block, and its rule.
    """
    path = path[:-1] if path[-2:-1] == ("kernel",) else path
    return next((RULES[name] for name in (".".join(path[-2:]), ".".join(path[-1:])) if name in RULES), None)


def leaf_sharding(path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Sharding of the leaf at ``path`` (strings) of the parameters, or of anything shaped like them (Adam's moments).

    An axis that its mesh axis does not divide stays whole, and so does a leaf without a rule (an optimizer's counters).
    """
    spec = rule(path) or PartitionSpec()
    if len(spec) > len(shape):
        spec = PartitionSpec()
    fits = [axis if axis and shape[i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(spec)]
    return NamedSharding(mesh, PartitionSpec(*fits))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree of arrays or shapes whose paths end in parameter names."""

    def one(path: tuple, leaf: Any) -> NamedSharding:
        names = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
        return leaf_sharding(names, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def microbatch_sizes(batch_size: int, mesh: Mesh | AbstractMesh) -> list[int]:
    """Rows that a microbatch may have: divisors of the batch that the devices share evenly."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return [m for m in range(ways, batch_size + 1, ways) if batch_size % m == 0]


def check_batch(batch_size: int, microbatch_size: int, mesh: Mesh | AbstractMesh, name: str = "data.batch_size") -> None:
    """Rows must divide evenly into microbatches and over the devices. Raises UserError with sizes that do.

    ``name`` says what makes ``batch_size``.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % microbatch_size:
        raise UserError(
            f"train.microbatch_size {microbatch_size} does not divide {name} {batch_size}; "
            f"use one of {microbatch_sizes(batch_size, mesh) or 'another batch size'}"
        )
    if microbatch_size % ways:
        low = max(ways, microbatch_size // ways * ways)
        raise UserError(
            f"{microbatch_size} rows in a microbatch are not divisible by mesh axes data x fsdp = {ways}; "
            f"use {low} or {low + ways} (train.microbatch_size, {name}), or change mesh.*"
        )


def within(mesh: Mesh, function: Callable) -> Callable:
    """``function`` traced and called with ``mesh`` as the current one, by which the model places its activations."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args)

    return wrapped


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays described by ``tree`` take on one device."""

    def one(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        count = 1
        for length in shape:
            count *= length
        return count * leaf.dtype.itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))
