"""A step whose loss or gradient is not finite: what is said of it, and its batch in the run's folder."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxreason.errors import UserError
from jaxreason.train import hosts
from jaxreason.types import Batch, TeacherView

FOLDER = "not_finite"
_NAME = re.compile(r"update-([0-9]{8,})-of-process-([0-9]+)\.npz")


def is_finite(metrics: dict) -> bool:
    """Whether the step can be used. A compiled step that skips decides by the same two numbers."""
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def described(metrics: dict, params: Any) -> str:
    """The loss and the gradient norm of a step, and the parameters whose gradient is not finite."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    bad = [path for path, norm in zip(paths, np.asarray(metrics["leaf_norms"])) if not np.isfinite(norm)]
    return (
        f"loss is {metrics['loss']}, gradient norm is {metrics['grad_norm']}; not finite: "
        f"{', '.join(bad[:4]) or 'the loss alone'}{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}"
    )


def save(run: Path, update: int, batch: Batch) -> None:
    """Writes this process's rows of the batch of optimizer update number ``update``. Raises OSError."""
    (run / FOLDER).mkdir(exist_ok=True)
    arrays: dict[str, Any] = {name: hosts.rows(value) for name, value in fields(batch).items()}
    np.savez_compressed(run / FOLDER / f"update-{update:08d}-of-process-{jax.process_index()}.npz", **arrays)


def updates(run: Path) -> list[int]:
    """The updates whose batches :func:`save` wrote, oldest first."""
    found = (_NAME.fullmatch(path.name) for path in (run / FOLDER).glob("*.npz"))
    return sorted({int(match[1]) for match in found if match})


def load(run: Path, update: int) -> Batch[np.ndarray]:
    """The whole batch that :func:`save` wrote, the rows of all processes. Raises UserError."""
    paths = sorted((run / FOLDER).glob(f"update-{update:08d}-of-process-*.npz"), key=lambda path: int(_number(path)))
    if not paths:
        raise UserError(f"{run / FOLDER} has no batch of update {update}; there are {updates(run) or 'none'}")
    parts = []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as file:
                parts.append(dict(file))
        except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
            raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    nested: dict[str, Any] = {"extras": {}, "teacher": {}}
    for name, value in whole.items():
        section, dot, rest = name.partition(".")
        (nested[section] if dot else nested)[rest if dot else name] = value
    teacher = nested.pop("teacher")
    return Batch(**nested, teacher=TeacherView(**teacher) if teacher else None)


def _number(path: Path) -> str:
    match = _NAME.fullmatch(path.name)
    return match[2] if match else "0"


def fields(batch: Batch[Any]) -> dict[str, Any]:
    """The arrays of a batch by dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, TeacherView):
            found |= {f"teacher.{inner.name}": getattr(value, inner.name) for inner in dataclasses.fields(value)}
        elif isinstance(value, dict):
            found |= {f"{field.name}.{name}": inner for name, inner in value.items()}
        elif value is not None:
            found[field.name] = value
    return found
