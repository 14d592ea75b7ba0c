"""What became of the rows: the content of data_report.json, its table, and a preview with the trained tokens marked."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxreason.data.batches import Piece
from jaxreason.data.encode import Fit
from jaxreason.data.sources import Source
from jaxreason.data.store import Store
from jaxreason.data.stream import Read
from jaxreason.data.tokenizer import Tokenizer

PERCENTILES = (5, 25, 50, 75, 90, 95, 99, 100)


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """One source's rows: read = kept + the dropped, by reason."""

    source: str
    formats: dict[str, int]  # rows of each
    rows: int
    kept: int
    truncated: int
    dropped: dict[str, int]
    first_dropped: dict[str, str]  # where the first row of a reason is, and what it holds
    tokens: int
    trained_tokens: int
    unread: tuple[str, ...]  # files that are there and not read, with why
    length_percentiles: dict[str, int]  # of all encoded examples, before data.over_length
    streamed: bool = False  # these are its first rows; what was read in the run is in ``stream`` when it ends


@dataclasses.dataclass(frozen=True)
class RowsReport:
    """How the kept examples fill rows."""

    examples: int | None  # None, as the next and the last: of a stream, which nobody has counted
    rows_per_epoch: int | None
    row_length: int
    packing_efficiency: float  # tokens / (rows x row length)
    batch_size: int
    steps_per_epoch: int | None


@dataclasses.dataclass(frozen=True)
class Report:
    sources: tuple[SourceReport, ...]  # the training source, then the evaluation source if it is another
    train: RowsReport
    eval: RowsReport | None
    template: str

    def to_dict(self) -> dict:
        """JSON-able, for data_report.json."""
        return dataclasses.asdict(self)

    def table(self) -> Group:
        """The same as rich tables."""
        return Group(*[_source_table(source) for source in self.sources], _rows_table(self.train, self.eval))


def stream_report(source: Source, read: Read) -> SourceReport:
    """Of the first rows of a stream."""
    return SourceReport(
        source=source.name,
        formats=dict(read.tally.formats),
        rows=read.tally.rows,
        kept=read.kept,
        truncated=read.truncated,
        dropped=read.tally.dropped,
        first_dropped=read.tally.first_dropped,
        tokens=read.tokens,
        trained_tokens=read.trained_tokens,
        unread=source.unread,
        length_percentiles=_percentiles(np.concatenate([np.zeros(0, np.int32), *read.lengths])),
        streamed=True,
    )


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    found = np.percentile(lengths, PERCENTILES, method="nearest") if len(lengths) else np.zeros(len(PERCENTILES))
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, found)}


def source_report(source: Source, store: Store, fit: Fit) -> SourceReport:
    rejects = store.meta["rejects"]
    return SourceReport(
        source=source.name,
        formats=store.meta["formats"],
        rows=store.meta["rows"],
        kept=len(fit.index),
        truncated=fit.truncated,
        dropped={reason: entry["count"] for reason, entry in rejects.items()} | fit.dropped,
        first_dropped={reason: entry["first"] for reason, entry in rejects.items()},
        tokens=int(fit.lengths.sum()),
        trained_tokens=int((fit.lengths - store.starts[fit.index]).sum()),
        unread=source.unread,
        length_percentiles=_percentiles(store.lengths),
    )


def formats_line(formats: dict[str, int]) -> str:
    """``messages``, or ``messages 10, example 3`` where the rows are of several formats."""
    if len(formats) < 2:
        return ", ".join(formats) or "no known row format"
    return ", ".join(f"{name} {count:,}" for name, count in sorted(formats.items(), key=lambda item: -item[1]))


def unread_line(unread: Sequence[str]) -> str:
    """The first files that are not read, with why."""
    return ", ".join(unread[:5]) + (f" and {len(unread) - 5:,} more" if len(unread) > 5 else "")


def preview(pieces: Sequence[Piece], names: Sequence[str], tokenizer: Tokenizer) -> list[Text]:
    """Examples as text, the trained tokens between ``[[`` and ``]]`` (and in bold)."""
    shown = []
    for (ids, start, _), name in zip(pieces, names):
        title = f"{name}: {len(ids)} tokens, {len(ids) - start} trained\n"
        prompt, trained = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])
        shown.append(Text.assemble((title, "underline"), prompt, ("[[" + trained + "]]", "bold")))
    return shown


def _source_table(report: SourceReport) -> Table:
    streamed = ", its first rows, since it is streamed" if report.streamed else ""
    table = Table(title=f"{report.source} ({formats_line(report.formats)}){streamed}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("rows read", f"{report.rows:,}")
    table.add_row("kept", f"{report.kept:,}", f"of them truncated: {report.truncated:,}" if report.truncated else "")
    for reason, count in sorted(report.dropped.items(), key=lambda item: -item[1]):
        first = report.first_dropped.get(reason)
        table.add_row(f"dropped: {reason}", f"{count:,}", f"first: {first}" if first else "")
    if report.unread:
        table.add_row("files not read", f"{len(report.unread):,}", unread_line(report.unread))
    table.add_row("tokens", f"{report.tokens:,}", f"trained: {report.trained_tokens:,}")
    table.add_row("tokens a row", "", "  ".join(f"{name} {n:,}" for name, n in report.length_percentiles.items()))
    return table


def _rows_table(train: RowsReport, held_out: RowsReport | None) -> Table:
    table = Table("", "examples", "rows", "row length", "filled", "batch", "steps an epoch")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, rows in (("train", train), ("eval", held_out)):
        if rows is not None:
            filled = f"{rows.packing_efficiency:.1%}"
            counts = ("-" if n is None else f"{n:,}" for n in (rows.examples, rows.rows_per_epoch))
            steps = "-" if rows.steps_per_epoch is None else str(rows.steps_per_epoch)
            table.add_row(name, *counts, str(rows.row_length), filled, str(rows.batch_size), steps)
    return table
