"""What people see: the one console, and two-column tables."""

import sys
from collections.abc import Sequence

from rich.console import Console
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
