"""Rows of tables: .parquet, .arrow, .csv and .tsv files."""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jaxreason.data import hub
from jaxreason.data.chunks import CHUNK_ROWS, Chunk, Inline, Item, Row
from jaxreason.data.example import Reject
from jaxreason.data.json_rows import MAX_ROW_BYTES
from jaxreason.data.remote import RemoteFile
from jaxreason.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet

GROUP_ROWS = 4096  # larger parquet row groups are read here in pieces, to bound what one process holds


@dataclasses.dataclass(frozen=True)
class ParquetGroup:
    file: Path | RemoteFile
    group: int
    first: int
    weight: int

    def rows(self) -> Iterator[tuple[int, Row]]:
        for batch in _read_parquet(self.file, self.group):
            yield from batch

    def place(self, key: int) -> str:
        return f"{self.file}, row {self.first + key + 1}"


def open_parquet(file: Path | RemoteFile) -> "pyarrow.parquet.ParquetFile":
    """Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file.open() if isinstance(file, RemoteFile) else file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file: {hub.reason(error)}") from None


def parquet(file: Path | RemoteFile) -> Iterator[Chunk]:
    """The file's row groups, the large ones in pieces."""
    metadata, first = open_parquet(file).metadata, 0
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        if count <= GROUP_ROWS:
            yield ParquetGroup(file, group, first, count)
        else:
            for batch in _read_parquet(file, group):
                yield Inline(str(file), first + batch[0][0], tuple(row for _, row in batch), len(batch))
        first += count


def _read_parquet(file: Path | RemoteFile, group: int) -> Iterator[list[tuple[int, Row]]]:
    import pyarrow

    at = 0
    try:
        for batch in open_parquet(file).iter_batches(CHUNK_ROWS, row_groups=[group]):
            rows = batch.to_pylist()
            yield list(enumerate(rows, at))
            at += len(rows)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}, near row {at + 1} of row group {group}: damaged: {hub.reason(error)}") from None


def arrow(path: Path | RemoteFile) -> Iterator[Chunk]:
    """The record batches of an Arrow file or stream, such as those of ``Dataset.save_to_disk``."""
    import pyarrow
    import pyarrow.ipc

    first = 0
    try:
        with pyarrow.PythonFile(path.open()) if isinstance(path, RemoteFile) else pyarrow.memory_map(str(path)) as file:
            try:
                reader = iter(pyarrow.ipc.open_stream(file))
            except pyarrow.ArrowInvalid:
                file.seek(0)
                of_file = pyarrow.ipc.open_file(file)
                reader = (of_file.get_batch(i) for i in range(of_file.num_record_batches))
            for batch in reader:
                for start in range(0, batch.num_rows, CHUNK_ROWS):
                    part = batch.slice(start, CHUNK_ROWS)
                    yield Inline(str(path), first, tuple(part.to_pylist()), part.nbytes)
                    first += part.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, near row {first + 1}: not a readable Arrow file: {hub.reason(error)}") from None


def separated(file: TextIO, origin: str, suffix: str) -> Iterator[tuple[Item, int]]:
    """(row, its characters) of a .csv or .tsv file, whose first line names the columns; an empty field is none."""
    csv.field_size_limit(MAX_ROW_BYTES)  # of the whole process: the module has no other
    reader = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
    try:
        columns = [name.strip() for name in next(reader, [])]
        if not all(columns) or len(set(columns)) < len(columns):
            raise UserError(f"{origin}, line 1: names the columns, each once; found {', '.join(columns)[:200] or 'nothing'}")
        for fields in reader:
            if not any(fields):
                continue
            size = sum(map(len, fields)) + len(fields)
            if len(fields) == len(columns):
                yield {name: field or None for name, field in zip(columns, fields)}, size
            else:
                yield Reject("another number of fields than of columns", f"{len(fields)} for {len(columns)}"), size
    except csv.Error as error:
        raise UserError(f"{origin}, line {reader.line_num}: not readable: {error}") from None
