"""What the command does: train or measure, then the headline and tables on the terminal and the report."""

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxreason.compare.gradients import measure
from jaxreason.compare.read import write_offline
from jaxreason.compare.report import write_report
from jaxreason.compare.runs import Entry, check, entries_of, has_steps, train_all
from jaxreason.compare.tables import ONE_UPDATE
from jaxreason.errors import UserError
from jaxreason.origin import command, origin
from jaxreason.report.tables import show
from jaxreason.terminal import console

__all__ = ["Entry", "entries_of", "finish", "offline", "train"]


def train(entries: Sequence[Entry], argv: Sequence[str] = ()) -> None:
    """Trains what is not trained yet, then reports. Raises UserError, after the report, if a run failed on its way.

    ``argv``: what the command was given, for the report.
    """
    check(entries)
    if entries[0].config.algorithm == "grpo" and entries[0].config.train.updates_per_rollout == 1:
        console.print(ONE_UPDATE)
    failures = train_all(entries)
    if failures is None:
        console.print("the comparison stopped; the same command goes on")
        return
    finish(entries[0].path.parent, [item.path for item in entries if has_steps(item.path)], argv)
    if failures:
        raise UserError("\n".join(failures))


def offline(entries: Sequence[Entry], argv: Sequence[str] = ()) -> None:
    """Measures the losses on one rollout, then reports, together with the comparison's runs as far as there are any."""
    where = entries[0].path.parent
    measured = measure(entries, check(entries))
    if jax.process_index() == 0:
        write_offline(where, measured | {"origin": origin(command("compare", argv))})
    finish(where, [item.path for item in entries if has_steps(item.path)], argv)


def finish(where: Path, runs: Sequence[Path], argv: Sequence[str] = ()) -> None:
    """Writes ``where``/report.html and its files, and shows its headline and tables."""
    if jax.process_index() > 0:
        return
    written = write_report(where, runs, origin(command("compare", argv)))
    for table in written.tables:
        show(table, console)
    for line in written.headline.lines():
        console.print(line, markup=False)
    console.print(f"report: {written.path}", markup=False)
    for line in written.files:
        console.print(f"  {line}", markup=False)
