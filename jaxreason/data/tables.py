"""Rows of .parquet files."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxreason.data import hub
from jaxreason.data.chunks import CHUNK_ROWS, Chunk, Inline, Row
from jaxreason.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet

GROUP_ROWS = 4096  # larger parquet row groups are read here in pieces, to bound what one process holds


@dataclasses.dataclass(frozen=True)
class ParquetGroup:
    origin: str
    group: int
    first: int
    weight: int

    def rows(self) -> Iterator[tuple[int, Row]]:
        for batch in _read_parquet(self.origin, self.group):
            yield from batch

    def place(self, key: int) -> str:
        return f"{self.origin}, row {self.first + key + 1}"


def open_parquet(path: Path | str) -> "pyarrow.parquet.ParquetFile":
    """Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {hub.reason(error)}") from None


def parquet(path: Path) -> Iterator[Chunk]:
    """The file's row groups, the large ones in pieces."""
    metadata, first = open_parquet(path).metadata, 0
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        if count <= GROUP_ROWS:
            yield ParquetGroup(str(path), group, first, count)
        else:
            for batch in _read_parquet(str(path), group):
                yield Inline(str(path), first + batch[0][0], tuple(row for _, row in batch), len(batch))
        first += count


def _read_parquet(path: str, group: int) -> Iterator[list[tuple[int, Row]]]:
    import pyarrow

    at = 0
    try:
        for batch in open_parquet(path).iter_batches(CHUNK_ROWS, row_groups=[group]):
            rows = batch.to_pylist()
            yield list(enumerate(rows, at))
            at += len(rows)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, near row {at + 1} of row group {group}: damaged: {hub.reason(error)}") from None
