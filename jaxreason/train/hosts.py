"""Host arrays across the processes of a run; with one process everything is the identity."""

from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Rows = TypeVar("Rows", np.ndarray, list)


def gather(values: np.ndarray) -> np.ndarray:
    """Every process's rows [n, …] of equal number, one after another: [processes · n, …]."""
    if jax.process_count() == 1:
        return np.asarray(values)
    return np.asarray(multihost_utils.process_allgather(np.asarray(values), tiled=True))


def mine(values: Rows) -> Rows:
    """This process's part of what ``gather`` put together, or of a list in the same order."""
    size = len(values) // jax.process_count()
    return values[jax.process_index() * size :][:size]


def largest(value: int) -> int:
    """The largest of the processes' numbers."""
    return int(gather(np.array([value])).max())


def alike(values: np.ndarray) -> bool:
    """Whether all processes have the same ``values``."""
    return len(np.unique(gather(values[None]), axis=0)) == 1


def rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array whose first axis is split over devices, in order."""
    if array.is_fully_addressable:
        return np.asarray(array)
    found = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(found[start]) for start in sorted(found)])
