"""Problems of a task by name: from the hub, from a local copy in the same row format, or from the task's own program."""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from jaxreason.data.example import Example, Reject
from jaxreason.data.sources import open_source
from jaxreason.errors import UserError
from jaxreason.evaluate.tasks.task import Problem, Row, Task
from jaxreason.paths import expanded


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The problems asked for, and why other rows are none."""

    problems: tuple[Problem, ...]
    dropped: dict[str, int]


def load(task: Task, place: str | None, split: str | None, first: int, count: int) -> Loaded:
    """Problems ``first`` to ``first + count`` of the task's rows, in their order; unusable rows are counted and passed over.

    ``place``: a local file or directory instead of the hub's. Raises UserError where no row is usable.
    """
    found, dropped = [], collections.Counter[str]()
    for problem in itertools.islice(_problems(task, place, split or task.split, dropped), first, first + count):
        found.append(problem)
    if not found:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in dropped.items()) or "too few rows"
        what = task.read.__doc__ if task.read else None
        raise UserError(
            f"task {task.name}: no usable problem in {place or task.source} ({reasons}); its rows are those of "
            f"{' '.join((what or task.name).split())}"
        )
    return Loaded(tuple(found), dict(dropped))


def load_shots(task: Task, place: str | None, problems: tuple[Problem, ...], count: int) -> list[tuple[Problem, ...]]:
    """For each problem the first ``count`` usable rows of the task's split of examples, of its own group, and never itself.

    ``place``: a file or directory of examples, or the local copy of the task. Raises UserError for too few.
    """
    if not count:
        return [() for _ in problems]
    if place is None and task.shots is None:
        raise UserError(f"task {task.name} has no split of examples to show; give rows of its format: shots_from=FILE")
    asked = {problem.question for problem in problems}
    groups: dict[str | None, list[Problem]] = {}
    wanted = {problem.group for problem in problems}
    full: set[str | None] = set()
    for shot in _problems(task, place, task.shots, collections.Counter()):
        shown = groups.setdefault(shot.group, [])
        if shot.question not in asked and len(shown) < count:
            shown.append(shot)
        if len(shown) == count:
            full.add(shot.group)
            if wanted <= full:
                break
    if missing := [group for group in wanted if len(groups.get(group, ())) < count]:
        of = f" of {missing[0]}" if missing[0] else ""
        raise UserError(f"task {task.name}: shots={count}, but there are {len(groups.get(missing[0], ()))} examples{of} to show")
    return [tuple(groups[problem.group]) for problem in problems]


def _problems(task: Task, place: str | None, split: str | None, dropped: collections.Counter[str]) -> Iterator[Problem]:
    if task.generate is not None:
        if place is not None:
            raise UserError(f"task {task.name} writes its own problems; leave out ={place}")
        yield from task.generate()
        return
    assert task.read is not None  # a task has one of both
    for row in _rows(task, place, split):
        try:
            if isinstance(row, Reject):
                raise row
            yield task.read(row)
        except Reject as reject:
            dropped[reject.reason] += 1


def _rows(task: Task, place: str | None, split: str | None) -> Iterator[Row | Reject]:
    source = task.source if place is None else str(_local(expanded(place, f"--task {task.name}"), task))
    try:
        opened = open_source(source, split, None, 0)
    except UserError as error:
        local = "" if place else f"; a local copy of it is --task {task.name}=PATH"
        raise UserError(f"task {task.name}, split {split}: {error}{local}") from None
    for chunk in opened.chunks():
        for _, row in chunk.rows():
            if isinstance(row, Example):
                raise UserError(f"task {task.name}: {source} writes problems of its own; give a file, a directory or a hub id")
            yield row


def _local(path: Path, task: Task) -> Path:
    """A file, or of a directory the part that belongs to the task's configuration (``main`` of GSM8K, ``gpqa_diamond.csv``)."""
    if not path.exists():
        raise UserError(f"task {task.name}={path}: no such file or directory; it is a local copy of {task.source}")
    config = task.source.partition(":")[2]
    if path.is_dir():
        for part in (path / config, path / f"{config}.csv"):
            if config and part.exists():
                return part
        tables = sorted(path.glob("*.csv"))
        if len(tables) == 1 and not any(path.rglob("*.parquet")):
            return tables[0]
    return path
