"""Which files a source means, and how each kind is read: JSON lines and arrays, CSV, parquet, Arrow; text also packed."""

import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from jaxreason.data import json_rows, tables
from jaxreason.data.chunks import CHUNK_BYTES, Chunk, grouped
from jaxreason.data.json_rows import JsonLines
from jaxreason.errors import UserError
from jaxreason.paths import expanded

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".zst")  # of the kinds that are text
_BINARY = (".parquet", ".arrow")
_SPLITS = {"train": "train", "test": "test", "eval": "eval"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
# What the hub's client and save_to_disk write beside the rows.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_MOST_EXPANSION = 4  # a guess, for the progress of packed files, whose length nobody knows before they are read


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of a source in the order they are read, and what else was there, each with the reason in parentheses."""

    paths: list[Path]
    unread: list[str]


def exists(source: str) -> bool:
    """Whether ``source`` is a file or a directory, or a pattern (``*``, ``?``, ``[``) that some file matches."""
    path = expanded(source, "data.source")
    return path.exists() or bool(_matches(path))


def find(source: str, split: str | None = None) -> Found:
    """The files of a source: itself, those that its pattern matches, or those of ``split`` below it in name order.

    A directory has splits where a file or folder below it is named after one (``test.jsonl``, ``data/test-0000.parquet``);
    its other files are then of ``train``. So has a pattern that matches files of several. Hidden files are left out, links to
    directories are followed. Raises UserError.
    """
    path = expanded(source, "data.source")
    if path.is_file():
        return Found([_readable(source, path)], [])
    root, candidates = _candidates(path)
    paths = [file for file in candidates if _reads(file)]
    unread = [f"{file.relative_to(root)} (no kind of file that is read)" for file in candidates if not _reads(file)]
    if not paths:
        raise UserError(f"data.source {source}: it holds no {', '.join(SUFFIXES)} file")
    if names := splits(source):
        wanted = _SPLITS.get(split or "train", split)
        unread += [f"{file.relative_to(root)} (split {_split(file.relative_to(root))})" for file in paths
                   if _split(file.relative_to(root)) != wanted]  # fmt: skip
        paths = [file for file in paths if _split(file.relative_to(root)) == wanted]
        if not paths:
            raise UserError(
                f"data.source {source}: no file of split {split}; by their names its files are of {', '.join(names)}: "
                "set data.split to one of them"
            )
    return Found([_readable(source, file) for file in paths], unread)


def splits(source: str) -> list[str]:
    """Splits that a source's files are named after; empty for a file, and where no name says one but ``train``."""
    path = expanded(source, "data.source")
    if path.is_file():
        return []
    root, candidates = _candidates(path)
    names = {_split(file.relative_to(root)) for file in candidates if _reads(file)}
    return sorted(names) if (names - {"train"} if path.is_dir() else len(names) > 1) else []


def _candidates(path: Path) -> tuple[Path, list[Path]]:
    """(root, files) of a directory or of a pattern, whose root is the part before its first wildcard."""
    if path.is_dir():
        return path, sorted(_below(path))
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    files = [file for match in _matches(path) for file in ([match] if match.is_file() else sorted(_below(match)))]
    return root, list(dict.fromkeys(files))


def _matches(path: Path) -> list[Path]:
    return [Path(match) for match in sorted(glob.glob(str(path), recursive=True))] if glob.has_magic(str(path)) else []


def _below(path: Path) -> Iterator[Path]:
    """The files below a directory that are not hidden. A directory that two links lead to is read once."""
    seen = {os.path.realpath(path)}
    for folder, folders, names in os.walk(path, followlinks=True):
        below = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(folders) if not name.startswith(".")}
        folders.clear()
        for name, real in below.items():
            if real not in seen:
                seen.add(real)
                folders.append(name)
        yield from (file for name in names if not name.startswith(".") and (file := Path(folder, name)).is_file())


def _kind(path: Path) -> tuple[str, str]:
    """(suffix, packing) in small letters: ``(.jsonl, .gz)``; the packing is empty where there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    return (suffixes[-1] if suffixes else ""), packing


def _reads(path: Path) -> bool:
    suffix, packing = _kind(path)
    return suffix in SUFFIXES and not (packing and suffix in _BINARY) and path.name not in _NO_ROWS


def _readable(source: str, path: Path) -> Path:
    suffix, packing = _kind(path)
    if suffix not in SUFFIXES or (packing and suffix in _BINARY):
        raise UserError(
            f"data.source {path}: unknown kind of file; known: {', '.join(SUFFIXES)}, and all but {' and '.join(_BINARY)} also "
            f"packed as {' or '.join(PACKED)}"
        )
    if path.stat().st_size == 0:
        raise UserError(f"data.source {path}: the file is empty")
    return path


def _split(relative: Path) -> str:
    """The split that a folder or the file's name says as a word, the innermost one; else ``train``."""
    words = re.split(r"[^A-Za-z]+", str(relative).lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "train")


def weight(path: Path) -> int:
    """Sum of the weights of the file's chunks, for progress; of a packed file a guess."""
    suffix, packing = _kind(path)
    if suffix == ".parquet":
        return tables.open_parquet(path).metadata.num_rows
    return path.stat().st_size * (_MOST_EXPANSION if packing else 1)


def chunks(path: Path) -> Iterator[Chunk]:
    """The file in pieces of bounded size. Raises UserError for a damaged one."""
    suffix, packing = _kind(path)
    if suffix == ".parquet":
        yield from tables.parquet(path)
    elif suffix == ".arrow":
        yield from tables.arrow(path)
    elif not packing and (suffix in (".jsonl", ".ndjson") or (suffix == ".json" and not _is_array(path, packing))):
        size = path.stat().st_size
        for start in range(0, size, CHUNK_BYTES):
            yield JsonLines(str(path), start, min(start + CHUNK_BYTES, size))
    else:
        yield from _in_order(path, suffix, packing)


def _in_order(path: Path, suffix: str, packing: str) -> Iterator[Chunk]:
    """Of a file that can only be read from its beginning."""
    origin, is_array = str(path), suffix == ".json" and _is_array(path, packing)
    try:
        with _opened(path, packing) as file:
            if suffix in (".csv", ".tsv") or is_array:
                text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="" if not is_array else None)
                rows = json_rows.array(text, origin) if is_array else tables.separated(text, origin, suffix)
            else:
                rows = json_rows.lines(file, origin)
            yield from grouped(origin, rows)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}; write it again as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged: {error}; download or write it again") from None


def _is_array(path: Path, packing: str) -> bool:
    try:
        with _opened(path, packing) as file:
            return json_rows.begins_array(file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged: {error}; download or write it again") from None


@contextlib.contextmanager
def _opened(path: Path, packing: str) -> Iterator[BinaryIO]:
    if packing == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            yield io.BufferedReader(stream)
    elif packing:
        with gzip.open(path) as packed:
            yield cast(BinaryIO, packed)
    else:
        with open(path, "rb") as file:
            yield file
