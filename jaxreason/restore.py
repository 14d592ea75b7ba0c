"""Reads Orbax's arrays: a tree of them at once, or one after another."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxreason.errors import UserError


def restore_tree(path: Path, abstract: Any) -> Any:
    """Orbax's arrays at ``path``, in the shapes, dtypes and shardings of ``abstract``. Raises UserError."""
    path = path.absolute()  # Orbax takes no other
    with ocp.StandardCheckpointer() as reader:
        _check_shapes(path, reader, abstract)
        with _readable(path):
            return reader.restore(path, abstract)


def restore_each(path: Path, abstract: dict, keep: Callable[[tuple[str, ...], jax.Array], Any]) -> dict:
    """:func:`restore_tree`, with each array replaced by what ``keep`` makes of its path and it before the next is read."""
    path = path.absolute()
    with ocp.StandardCheckpointer() as reader:
        _check_shapes(path, reader, abstract)

    def read(keys: tuple, leaf: Any) -> Any:
        names = tuple(key.key for key in keys)
        wanted = functools.reduce(lambda inner, name: {name: inner}, reversed(names), leaf)
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        there = one.restore(path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True))
        return keep(names, jax.tree.leaves(there)[0])

    with ocp.PyTreeCheckpointer() as one, _readable(path):
        return jax.tree_util.tree_map_with_path(read, abstract)


def _check_shapes(path: Path, reader: ocp.StandardCheckpointer, abstract: Any) -> None:
    """Raises UserError for an array that is only there or only wanted, or of another shape."""
    trees = reader.metadata(path).item_metadata.tree, abstract
    stored, wanted = ({_name(p): s.shape for p, s in jax.tree_util.tree_leaves_with_path(tree)} for tree in trees)
    for name in sorted({*stored, *wanted}):
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: {name} is {stored.get(name, 'missing')} there and {wanted.get(name, 'unknown')} in this run's "
                "model; the checkpoint belongs to another architecture"
            )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says in one line that arrays could not be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason[:400]}; run the same command again, or use another step") from None


def _name(path: tuple) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
