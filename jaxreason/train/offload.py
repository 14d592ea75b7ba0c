"""Arrays that leave the devices for host memory while they are not needed, and come back bit for bit."""

import time
from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")
_HOST = "pinned_host"


def to_host(tree: Tree) -> Tree:
    """A copy in pinned host memory; the devices' memory is free once nothing refers to ``tree`` any more."""
    places = jax.tree.map(lambda x: x.sharding.with_memory_kind(_HOST), tree)
    return jax.block_until_ready(jax.device_put(tree, places))


def to_devices(tree: Tree, shardings: Any) -> Tree:
    """A copy on the devices of what :func:`to_host` returned; ``shardings``: a tree of where each array belongs."""
    return jax.block_until_ready(jax.device_put(tree, shardings))


class Shelf:
    """Where a train state waits while it is not needed: in host memory or, without ``offload``, where it is.

    Args:
      abstract: the state as shapes with their shardings.
      offload: whether it moves at all.
    """

    def __init__(self, abstract: Any, offload: bool):
        self._shardings = jax.tree.map(lambda s: s.sharding, abstract) if offload else None
        self.seconds: dict[str, float] = {}  # of the last way there and back, under ``offload``

    def put(self, tree: Tree) -> Tree:
        """The tree on the host; nothing else may refer to its arrays if the devices' memory is to be free."""
        if self._shardings is None:
            return tree
        clock = time.monotonic()
        tree = to_host(tree)
        self.seconds = {"offload": time.monotonic() - clock}
        return tree

    def take(self, tree: Tree) -> Tree:
        """The tree on the devices again, bit for bit."""
        if self._shardings is None:
            return tree
        clock = time.monotonic()
        tree = to_devices(tree, self._shardings)
        self.seconds["offload"] += time.monotonic() - clock
        return tree
