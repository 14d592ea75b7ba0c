"""What the command does: train or measure, then tables on the terminal and the report."""

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxreason.compare.gradients import measure
from jaxreason.compare.read import write_offline
from jaxreason.compare.report import write_report
from jaxreason.compare.runs import Entry, check, entries_of, has_steps, train_all
from jaxreason.compare.tables import ONE_UPDATE, show
from jaxreason.errors import UserError
from jaxreason.terminal import console

__all__ = ["Entry", "entries_of", "finish", "offline", "train"]


def train(entries: Sequence[Entry]) -> None:
    """Trains what is not trained yet, then reports. Raises UserError, after the report, if a run failed on its way."""
    check(entries)
    if entries[0].config.algorithm == "grpo" and entries[0].config.train.updates_per_rollout == 1:
        console.print(ONE_UPDATE)
    failures = train_all(entries)
    if failures is None:
        console.print("the comparison stopped; the same command goes on")
        return
    finish(entries[0].path.parent, [item.path for item in entries if has_steps(item.path)])
    if failures:
        raise UserError("\n".join(failures))


def offline(entries: Sequence[Entry]) -> None:
    """Measures the losses on one rollout, then reports, together with the comparison's runs as far as there are any."""
    where = entries[0].path.parent
    measured = measure(entries, check(entries))
    if jax.process_index() == 0:
        write_offline(where, measured)
    finish(where, [item.path for item in entries if has_steps(item.path)])


def finish(where: Path, runs: Sequence[Path]) -> None:
    """Writes ``where``/report.html and shows its tables."""
    if jax.process_index() > 0:
        return
    path, tables = write_report(where, runs)
    for table in tables:
        show(table, console)
    console.print(f"report: {path}", markup=False)
