"""Slots over the devices of this process: each device has whole weights, and decodes its own share of the slots.

Devices exchange nothing while they decode, and processes nothing at all, so that neither waits for another's longest
completion within a chunk, and processes may run different numbers of chunks.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "slots"
WHOLE, SPLIT, COLUMNS = PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(None, AXIS)
Specs = PartitionSpec | tuple["Specs", ...]  # of a function's arguments or results


def devices_for(slots: int, devices: int) -> int:
    """How many of ``devices`` decode: no more than there are slots."""
    return min(slots, devices)


def padded(slots: int, devices: int) -> int:
    """``slots`` rounded up to what the devices that decode can share evenly."""
    share = devices_for(slots, devices)
    return -(-slots // share) * share


def spread(params: dict, slots: int) -> tuple[dict, Mesh | None]:
    """This process's copy of the weights, and the mesh of its devices that decode; None: it decodes as one.

    Weights that are whole on several devices are used on each, without a copy. Weights on one device, or split over
    the devices of one process (too large for one of them), are decoded with as they are: one program, as jit sees fit.

    Raises: ValueError for weights that are split over several processes.
    """
    leaves = jax.tree.leaves(params)
    if not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return params, None
    if not all(leaf.is_fully_replicated for leaf in leaves):
        if not all(leaf.is_fully_addressable for leaf in leaves):
            raise ValueError("weights for decoding are split over processes; put them whole on every device first")
        return params, None
    here = sorted(leaves[0].sharding.addressable_devices, key=lambda device: device.id)
    here = here[: devices_for(slots, len(here))]
    if len(here) == 1:
        return jax.tree.map(lambda leaf: _on(leaf, here)[0], params), None
    mesh = Mesh(np.array(here), (AXIS,), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, WHOLE)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_single_device_arrays(leaf.shape, whole, _on(leaf, here)), params
    ), mesh


def _on(leaf: jax.Array, devices: list) -> list[jax.Array]:
    """The leaf's copies on ``devices``."""
    copies = {shard.device: shard.data for shard in leaf.addressable_shards}
    return [copies[device] for device in devices]


def count(mesh: Mesh | None) -> int:
    """Devices that decode."""
    return 1 if mesh is None else mesh.size


def placed(mesh: Mesh | None) -> NamedSharding | None:
    """Where arrays with an entry a slot lie; None: the default device."""
    return None if mesh is None else NamedSharding(mesh, SPLIT)


def over(mesh: Mesh | None, function: Callable, arguments: Specs, results: Specs) -> Callable:
    """``function`` on each device's own part of ``arguments``, described by WHOLE, SPLIT and COLUMNS, as the results."""
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)
