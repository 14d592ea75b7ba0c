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

from jaxreason.data import hub, json_rows, tables
from jaxreason.data.chunks import CHUNK_BYTES, Chunk, grouped
from jaxreason.data.json_rows import JsonLines
from jaxreason.data.remote import RemoteFile, listing, shown
from jaxreason.errors import UserError
from jaxreason.paths import expanded, protocol

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".zst")  # of the kinds that are text
_JSON = (".jsonl", ".ndjson", ".json")
_BINARY = (".parquet", ".arrow")
_SPLITS = {"train": "train", "test": "test", "eval": "eval"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
# What the hub's client and save_to_disk write beside the rows.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_UNKNOWN_BYTES = 1 << 30  # a guess as well, of a file whose server does not say its size
_MOST_EXPANSION = 4  # a guess, for the progress of packed files, whose length nobody knows before they are read


File = Path | RemoteFile


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of a source in the order they are read, and what else was there, each with the reason in parentheses."""

    files: list[File]
    unread: list[str]


def exists(source: str) -> bool:
    """Whether ``source`` is an address, a file or a directory, or a pattern (``*``, ``?``, ``[``) that some file matches."""
    if protocol(source) is not None:
        return True
    path = expanded(source, "data.source")
    return path.exists() or bool(_matches(path))


def find(source: str, split: str | None = None) -> Found:
    """The files of a source: itself, those that its pattern matches, or those of ``split`` below it in name order.

    A directory has splits where a file or folder below it is named after one (``test.jsonl``, ``data/test-0000.parquet``);
    its other files are then of ``train``. So has a pattern that matches files of several. Hidden files are left out, links to
    directories are followed. Raises UserError.
    """
    kind, listed = _listing(source)
    if kind == "file":
        return Found([_readable(file) for _, file in listed], [])
    rows = [(name, file) for name, file in listed if _reads(file)]
    unread = [f"{name} (no kind of file that is read)" for name, file in listed if not _reads(file)]
    if not rows:
        raise UserError(f"data.source {shown(source)}: it holds no {', '.join(SUFFIXES)} file")
    if names := _splits(kind, listed):
        wanted = _SPLITS.get(split or "train", split)
        unread += [f"{name} (split {_split(name)})" for name, _ in rows if _split(name) != wanted]
        rows = [(name, file) for name, file in rows if _split(name) == wanted]
        if not rows:
            raise UserError(
                f"data.source {shown(source)}: no file of split {split}; by their names its files are of {', '.join(names)}: "
                "set data.split to one of them"
            )
    return Found([_readable(file) for _, file in rows], unread)


def splits(source: str) -> list[str]:
    """Splits that a source's files are named after; empty for a file, and where no name says one but ``train``."""
    return _splits(*_listing(source))


def _splits(kind: str, listed: list[tuple[str, File]]) -> list[str]:
    names = {_split(name) for name, file in listed if kind != "file" and _reads(file)}
    return sorted(names) if (names - {"train"} if kind == "directory" else len(names) > 1) else []


def _listing(source: str) -> tuple[str, list[tuple[str, File]]]:
    """(``file``, ``directory`` or ``pattern``, the files with their paths below it)."""
    if protocol(source) is not None:
        return cast(tuple[str, list[tuple[str, File]]], listing(source))
    path = expanded(source, "data.source")
    if path.is_file():
        return "file", [(path.name, path)]
    root, candidates = _candidates(path)
    return "directory" if path.is_dir() else "pattern", [(str(file.relative_to(root)), file) for file in candidates]


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


def _kind(file: File) -> tuple[str, str]:
    """(suffix, packing) in small letters: ``(.jsonl, .gz)``; the packing is empty where there is none."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    return (suffixes[-1] if suffixes else ""), packing


def _reads(file: File) -> bool:
    suffix, packing = _kind(file)
    return suffix in SUFFIXES and not (packing and suffix in _BINARY) and file.name not in _NO_ROWS


def _readable(file: File) -> File:
    suffix, packing = _kind(file)
    if suffix not in SUFFIXES or (packing and suffix in _BINARY):
        raise UserError(
            f"data.source {file}: unknown kind of file; known: {', '.join(SUFFIXES)}, and all but {' and '.join(_BINARY)} also "
            f"packed as {' or '.join(PACKED)}"
        )
    if size(file) == 0:
        raise UserError(f"data.source {file}: the file is empty")
    return file


def _split(relative: str) -> str:
    """The split that a folder or the file's name says as a word, the innermost one; else ``train``."""
    words = re.split(r"[^A-Za-z]+", relative.lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "train")


def size(file: File) -> int | None:
    """Bytes of the file; None where its server does not say."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def stamp(file: File) -> list[str | int | None]:
    """Tells a file from others: name, size and tag or time. It holds no folder, so that files may be moved."""
    return [file.name, size(file), file.stamp if isinstance(file, RemoteFile) else file.stat().st_mtime_ns]


def exact_stamp(file: File) -> list[str | int | None]:
    """Tells a file's content from others for as long as it stays where it is."""
    if isinstance(file, RemoteFile):
        return [str(file), file.size, file.stamp]
    # The time of the last change of a file's inode cannot be set back, as that of its content can.
    return [str(file.resolve()), (s := file.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns]


def weight(file: File) -> int:
    """Sum of the weights of the file's chunks, for progress; of a packed file a guess."""
    suffix, packing = _kind(file)
    if suffix == ".parquet":
        return tables.open_parquet(file).metadata.num_rows
    return (size(file) or _UNKNOWN_BYTES) * (_MOST_EXPANSION if packing else 1)


def chunks(file: File) -> Iterator[Chunk]:
    """The file in pieces of bounded size. Raises UserError for a damaged one, and for one that is gone."""
    suffix, packing = _kind(file)
    if suffix == ".parquet":
        yield from tables.parquet(file)
    elif suffix == ".arrow":
        yield from tables.arrow(file)
    elif isinstance(file, RemoteFile) or packing or suffix not in _JSON or (suffix == ".json" and _is_array(file, packing)):
        yield from _in_order(file, suffix, packing)
    else:
        with _reading(file):
            end = file.stat().st_size
        for start in range(0, end, CHUNK_BYTES):
            yield JsonLines(str(file), start, min(start + CHUNK_BYTES, end))


def _in_order(file: File, suffix: str, packing: str) -> Iterator[Chunk]:
    """Of a file that can only be read from its beginning."""
    origin, is_array = str(file), suffix == ".json" and _is_array(file, packing)
    with _reading(file), _opened(file, packing) as content:
        if suffix in (".csv", ".tsv") or is_array:
            text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="" if not is_array else None)
            rows = json_rows.array(text, origin) if is_array else tables.separated(text, origin, suffix)
        else:
            rows = json_rows.lines(content, origin)
        yield from grouped(origin, rows)


def _is_array(file: File, packing: str) -> bool:
    with _reading(file), _opened(file, packing) as content:
        return json_rows.begins_array(content)


@contextlib.contextmanager
def _reading(file: File) -> Iterator[None]:
    """Raises UserError for what goes wrong while a file is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}; write it again as UTF-8") from None
    except FileNotFoundError:
        raise UserError(f"{file}: it was there at the start and is gone; put it back, and run the same command again") from None
    except PermissionError as error:
        raise UserError(f"{file}: it may not be read: {hub.reason(error)}") from None
    except (OSError, EOFError, zlib.error) as error:
        what = "damaged" if isinstance(file, Path) else "damaged, or its connection broke"
        raise UserError(f"{file}: {what}: {error}; download or write it again") from None


@contextlib.contextmanager
def _opened(file: File, packing: str) -> Iterator[BinaryIO]:
    with file.open(in_order=True) if isinstance(file, RemoteFile) else open(file, "rb") as raw:
        if packing == ".zst":
            import pyarrow

            with pyarrow.input_stream(raw, compression="zstd") as stream:
                yield io.BufferedReader(stream)
        elif packing:
            with gzip.open(raw) as packed:
                yield cast(BinaryIO, packed)
        else:
            yield raw
