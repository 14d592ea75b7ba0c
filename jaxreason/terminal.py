"""What people see: the one console, two-column tables, and the progress of long work."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def show_table(title: str, rows: Sequence[tuple[str, object]]) -> None:
    """A two-column table on the terminal."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(name, str(value))
    console.print(table)


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB below a quarter of one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


class Working:
    """Progress of something that takes a while: a bar with an ETA on a terminal, else a line every ten seconds.

    Use it in a ``with``, and call it with how much of ``total`` is done and a few words.
    """

    _HEARTBEAT = 10.0

    def __init__(self, name: str, total: int):
        self._name, self._total, self._began = name, total, time.monotonic()
        self._spoke = self._began
        live = console.is_terminal and not console.quiet
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "eta",
                   TimeRemainingColumn(), TextColumn("{task.fields[text]}"))  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=not live, transient=True)
        self._task, self._live = self._bar.add_task(name, total=total, text=""), live
        self._first: float | None = None

    def __enter__(self) -> "Working":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: float, text: str = "") -> None:
        if self._first is None:
            self._first = done  # what was there before this start has taken none of its time
        now = time.monotonic()
        self._bar.update(self._task, completed=done, text=text)
        if not self._live and now - self._spoke > self._HEARTBEAT:
            moved = done - self._first
            eta = f"{(now - self._began) / moved * (self._total - done):.0f}s" if moved > 0 else "unknown"
            console.print(f"{self._name} {done:.0f}/{self._total} eta {eta} {text}", markup=False)
            self._spoke = now
