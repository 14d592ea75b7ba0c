"""Tasks that a small program writes, so that a first run needs no download: ``data.source=embedded:NAME``.

``embedded:arithmetic?careful=0.5&operations=3`` sets a task's parameters; ``TASKS`` lists the tasks.
``python -m jaxreason.data.embedded`` prints examples and token lengths.
"""

import itertools
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxreason.data.embedded import arithmetic
from jaxreason.data.example import Example
from jaxreason.errors import UserError
from jaxreason.plugins import nearest

__all__ = ["SPLITS", "TASKS", "Task", "examples", "parse"]

SPLITS = ("train", "eval")


class Task(NamedTuple):
    """A task: a frozen dataclass of its parameters and a generator of endless, different examples."""

    parameters: type
    generate: Callable[[Any, str, int], Iterator[Example]]  # (parameters, split, seed)
    rows: dict[str, int]  # how many examples a split has where the caller names no number
    most_rows: dict[str, int]  # beyond this, new problems become hard to find


TASKS: dict[str, Task] = {
    "arithmetic": Task(
        arithmetic.Arithmetic,
        arithmetic.generate,
        rows={"train": 40_000, "eval": 1_000},
        most_rows={"train": 500_000, "eval": 50_000},
    ),
}


def examples(name: str, split: str | None, n: int | None = None, seed: int = 0) -> list[Example]:
    """The first ``n`` examples of a split, all of different problems; None: as many as the task's default.

    ``name`` may carry parameters (``arithmetic?careful=0.5``). A function of its arguments alone, the same on every
    machine and Python version. No problem of ``eval`` is in ``train``, whatever the seeds and parameters. Raises
    UserError for an unknown task, parameter or split, and for more examples than the task can give.
    """
    task, parameters = parse(name)
    if split not in SPLITS:
        raise UserError(f"embedded:{name}: no split {split!r}; it has {' and '.join(SPLITS)}")
    n = task.rows[split] if n is None else n
    if not 0 <= n <= task.most_rows[split]:
        raise UserError(f"embedded:{name}: {n} examples of {split} asked for; it gives 0 to {task.most_rows[split]}")
    return list(itertools.islice(task.generate(parameters, split, seed), n))


def parse(name: str) -> tuple[Task, Any]:
    """The task and its parameters that ``NAME?key=value&key=value`` means. Raises UserError."""
    base, _, query = name.partition("?")
    if base not in TASKS:
        raise UserError(f"embedded:{name}: no task {base!r}{nearest(base, TASKS)}; known: {', '.join(sorted(TASKS))}")
    task = TASKS[base]
    fields = typing.get_type_hints(task.parameters)
    values: dict[str, Any] = {}
    for word in query.split("&") if query else ():
        key, equals, text = word.partition("=")
        if not equals or key in values:
            raise UserError(f"embedded:{name}: {word!r} is not one key=value for each key, e.g. {base}?operations=3")
        if key not in fields:
            raise UserError(f"embedded:{name}: no parameter {key}{nearest(key, fields)}; known: {', '.join(fields)}")
        kind = fields[key]
        try:
            values[key] = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise UserError(f"embedded:{name}: {key} is {text!r}; give {wanted}") from None
    return task, task.parameters(**values)
