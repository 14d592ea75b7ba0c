"""Rows of .jsonl, .json and .parquet files, cut into chunks that any process can read alone."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxreason.data import hub
from jaxreason.data.example import Example
from jaxreason.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet

SUFFIXES = (".jsonl", ".json", ".parquet")
CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 512
_SPLITS = {"train": "train", "test": "test", "eval": "eval"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_GROUP_ROWS = 4096  # larger parquet row groups are read here in pieces, to bound what one process holds

Row = dict[str, Any]


class Chunk(Protocol):
    """Some rows of a source. ``origin`` names the file, whose rows share one format."""

    @property
    def origin(self) -> str: ...

    @property
    def weight(self) -> int:
        """Of the source's ``total``, for progress."""

    def rows(self) -> Iterator[tuple[int, Row | Example]]:
        """(key, row) pairs; ``place(key)`` names the row for a message. Raises UserError for a damaged file."""

    def place(self, key: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """The lines of a file that begin in bytes [start, stop)."""

    origin: str
    start: int
    stop: int

    @property
    def weight(self) -> int:
        return self.stop - self.start

    def rows(self) -> Iterator[tuple[int, Row]]:
        with open(self.origin, "rb") as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # the line before began in the chunk before
            while (at := file.tell()) < self.stop:
                line = file.readline()
                if line.strip():
                    yield at, self._parse(line, at)

    def _parse(self, line: bytes, at: int) -> Row:
        try:
            row = json.loads(line)
        except ValueError as error:
            cut = "" if line.endswith(b"\n") else ", and the file ends there: it may be cut short"
            detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{self.place(at)}: not valid JSON: {detail}{cut}; repair or remove the line") from None
        return _require_object(row, self.place, at)

    def place(self, key: int) -> str:
        line = 1
        with open(self.origin, "rb") as file:
            while (left := key - file.tell()) > 0:
                line += file.read(min(left, 1 << 20)).count(b"\n")
        return f"{self.origin}, line {line}"


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


@dataclasses.dataclass(frozen=True)
class Inline:
    """Rows that were read already."""

    origin: str
    first: int
    items: tuple[Row | Example, ...]
    weight: int

    def rows(self) -> Iterator[tuple[int, Row | Example]]:
        yield from enumerate(self.items)

    def place(self, key: int) -> str:
        return f"{self.origin}, row {self.first + key + 1}"


def find(source: str, path: Path, split: str | None = None) -> list[Path]:
    """The files of ``path``: itself, or those of ``split`` below it in name order, hidden ones left out.

    A directory has splits where a file or folder below it is named after one (``test.jsonl``, ``data/test-0000.parquet``);
    its other files are then of ``train``. Raises UserError.
    """
    paths = _below(path) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"data.source {source}: the directory holds no {', '.join(SUFFIXES)} file")
    if names := splits(path):
        paths = [file for file in paths if _split(file.relative_to(path)) == _SPLITS.get(split or "train", split)]
        if not paths:
            raise UserError(
                f"data.source {source}: no file of split {split}; by their names its files are of {', '.join(names)}: "
                "set data.split to one of them"
            )
    for file in paths:
        if file.suffix not in SUFFIXES:
            raise UserError(f"data.source {file}: unknown kind of file; known: {', '.join(SUFFIXES)}")
        if file.stat().st_size == 0:
            raise UserError(f"data.source {file}: the file is empty")
    return paths


def splits(path: Path) -> list[str]:
    """Splits that files below a directory are named after; empty for a file, and where no name says one but ``train``."""
    names = {_split(file.relative_to(path)) for file in _below(path)} if path.is_dir() else set()
    return sorted(names) if names - {"train"} else []


def _below(path: Path) -> list[Path]:
    below = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
    return sorted(file for file in below if file.suffix in SUFFIXES and file.is_file())


def _split(relative: Path) -> str:
    """The split that a folder or the file's name says as a word, the innermost one; else ``train``."""
    words = re.split(r"[^A-Za-z]+", str(relative.with_suffix("")).lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "train")


def weight(path: Path) -> int:
    """Sum of the weights of the file's chunks."""
    return _parquet(path).metadata.num_rows if path.suffix == ".parquet" else path.stat().st_size


def chunks(path: Path) -> Iterator[Chunk]:
    """The file in pieces of bounded size."""
    if path.suffix == ".parquet":
        yield from _parquet_chunks(path)
    elif path.suffix == ".json" and _first_byte(path) == b"[":
        yield from _array_chunks(path)
    else:
        size = path.stat().st_size
        for start in range(0, size, CHUNK_BYTES):
            yield JsonLines(str(path), start, min(start + CHUNK_BYTES, size))


def _require_object(row: Any, place: Callable[[int], str], key: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{place(key)}: a row is an object with columns, found {type(row).__name__}")
    return row


def _first_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        while (byte := file.read(1)).isspace():
            pass
    return byte


def _array_chunks(path: Path) -> Iterator[Inline]:
    """Objects of one JSON array, decoded one after the other from a growing buffer, never the whole file at once."""
    items: list[Row] = []
    first = weight = 0
    for row, size in _array_items(path):
        items.append(_require_object(row, lambda key: f"{path}, element {key + 1}", first + len(items)))
        weight += size
        if len(items) == CHUNK_ROWS or weight >= CHUNK_BYTES:
            yield Inline(str(path), first, tuple(items), weight)
            items, first, weight = [], first + len(items), 0
    if items:
        yield Inline(str(path), first, tuple(items), weight)


def _array_items(path: Path) -> Iterator[tuple[Any, int]]:
    """(element, its characters) of a JSON array."""
    decoder, separator = json.JSONDecoder(), re.compile(r"[\s,]*")
    with open(path, encoding="utf-8") as file:
        buffer, want, line = file.read(CHUNK_BYTES).lstrip(), CHUNK_BYTES, 1
        at = 1  # after the "["
        while True:
            matched = separator.match(buffer, at)
            assert matched is not None  # the pattern also matches no character
            begin = matched.end()
            if buffer[begin : begin + 1] == "]":
                return
            try:
                row, end = decoder.raw_decode(buffer, begin)
            except json.JSONDecodeError as error:
                more = file.read(want)
                want *= 2  # so that one huge element is not parsed again for every few bytes
                if not more:
                    line += buffer.count("\n", 0, error.pos)
                    raise UserError(
                        f"{path}, about line {line}: not valid JSON: {error.msg}; the file may be cut short"
                    ) from None
                line += buffer.count("\n", 0, at)
                buffer, at = buffer[at:] + more, 0
                continue
            yield row, end - at
            at = end


def _parquet(path: Path | str) -> "pyarrow.parquet.ParquetFile":
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {hub.reason(error)}") from None


def _parquet_chunks(path: Path) -> Iterator[Chunk]:
    metadata, first = _parquet(path).metadata, 0
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        if count <= _GROUP_ROWS:
            yield ParquetGroup(str(path), group, first, count)
        else:
            for batch in _read_parquet(str(path), group):
                yield Inline(str(path), first + batch[0][0], tuple(row for _, row in batch), len(batch))
        first += count


def _read_parquet(path: str, group: int) -> Iterator[list[tuple[int, Row]]]:
    import pyarrow

    at = 0
    try:
        for batch in _parquet(path).iter_batches(CHUNK_ROWS, row_groups=[group]):
            rows = batch.to_pylist()
            yield list(enumerate(rows, at))
            at += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}, near row {at + 1} of row group {group}: damaged: {hub.reason(error)}") from None
