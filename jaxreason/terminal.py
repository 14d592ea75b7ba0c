"""What people see: the one console, two-column tables, and the progress of long work."""

import sys
import threading
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

NO_TOKENS_YET = "no tokens yet: the first time it compiles"
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


def seconds(value: float) -> str:
    """``14 s``, ``2.4 min``, ``1.5 h``."""
    return f"{value:.0f} s" if value < 100 else f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"


class Bars:
    """The one live display of a terminal: a line for each piece of work that goes on, which may be inside one another.

    A line keeps its name, bar, count, time and ETA at 80 columns; what it says in addition is cut where the terminal ends.
    """

    def __init__(self) -> None:
        self._display: Progress | None = None
        self._open = 0
        self._changing = threading.RLock()  # a program compiles in a thread of its own while weights load

    def add(self, name: str, total: float, done: int = 0, text: str = "") -> TaskID:
        """A new line."""
        with self._changing:
            return self._add(name, total, done, text)

    def _add(self, name: str, total: float, done: int, text: str) -> TaskID:
        if self._display is None:
            fixed, rest = Column(no_wrap=True), Column(ratio=1, no_wrap=True, overflow="ellipsis")
            self._display = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
                BarColumn(10), MofNCompleteColumn(table_column=fixed), TimeElapsedColumn(table_column=fixed),
                TextColumn("eta", table_column=fixed), TimeRemainingColumn(table_column=fixed),
                TextColumn("{task.fields[text]}", markup=False, table_column=rest), console=console, expand=True,
            )  # fmt: skip
            self._display.start()
        self._open += 1
        return self._display.add_task(name, total=total, completed=done, text=text)

    def update(self, task: TaskID, done: float, text: str) -> None:
        if self._display is not None:
            self._display.update(task, completed=done, text=text)

    def end(self, task: TaskID, stays: bool) -> None:
        """``stays``: the line is left on the screen as it was last."""
        with self._changing:
            if self._display is None:
                return
            if not stays:
                self._display.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self._display.live.transient = not self._display.tasks
                self._display.stop()
                self._display = None


bars = Bars()


class Working:
    """Progress of something that takes a while: a bar with an ETA on a terminal, else a line every ten seconds.

    Use it in a ``with``, and call it with how much of ``total`` is done and a few words; ``text`` are the words until then.
    The line comes from a thread, so that what compiles or hangs is not silent.
    """

    _HEARTBEAT = 10.0

    def __init__(self, name: str, total: int, text: str = ""):
        self._name, self._total, self._done, self._text = name, total, 0.0, text
        self._live = console.is_terminal and not console.quiet
        self._first: float | None = None
        self._over = threading.Event()

    def __enter__(self) -> "Working":
        self._began = time.monotonic()
        if self._live:
            self._task = bars.add(self._name, self._total, text=self._text)
        elif not console.quiet:
            threading.Thread(target=self._speak, name="progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._live:
            bars.end(self._task, stays=False)

    def __call__(self, done: float, text: str | None = None) -> None:
        if self._first is None:
            self._first = done  # what was there before this start has taken none of its time
        self._done, self._text = done, self._text if text is None else text
        if self._live:
            bars.update(self._task, done, self._text)

    def _speak(self) -> None:
        while not self._over.wait(self._HEARTBEAT):
            console.print(self._line(), markup=False)

    def _line(self) -> str:
        done, spent = self._done, time.monotonic() - self._began
        moved = done - self._first if self._first is not None else 0.0
        eta = seconds(spent / moved * (self._total - done)) if moved > 0 else "unknown"
        return f"{self._name} {done:.0f}/{self._total} {seconds(spent)} eta {eta} {self._text}".rstrip()
