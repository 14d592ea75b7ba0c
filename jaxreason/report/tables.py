"""Tables as text, for the terminal and for pages, and as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """The first cell of a row names it."""

    name: str  # of its file: letters, digits, _ and -
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)  # its numbers, unrounded, for CSV; none: its cells are text


def show(table: Table, console: Console) -> None:
    """Prints a table; no cell is read as markup."""
    drawn = RichTable(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    for name in table.header:
        drawn.add_column(Text(name), overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    console.print(drawn)
    for note in table.notes:
        console.print(note, markup=False)


def csv_of(table: Table) -> str:
    """A header and a line for each record, or each row; what is not known is empty."""
    out = io.StringIO()
    if table.records:
        names = list(dict.fromkeys(name for record in table.records for name in record))
        keyed = csv.DictWriter(out, names, restval="", lineterminator="\n")
        keyed.writeheader()
        keyed.writerows(table.records)
    else:
        lines: Sequence[Sequence[str]] = [table.header, *table.rows]
        csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()
