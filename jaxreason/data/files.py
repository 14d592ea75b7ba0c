"""Rows of .jsonl, .json and .parquet files, cut into chunks that any process can read alone."""

import re
from collections.abc import Iterator
from pathlib import Path

from jaxreason.data import json_rows, tables
from jaxreason.data.chunks import CHUNK_BYTES, Chunk, Inline, grouped
from jaxreason.data.json_rows import JsonLines
from jaxreason.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
_SPLITS = {"train": "train", "test": "test", "eval": "eval"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


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
    return tables.open_parquet(path).metadata.num_rows if path.suffix == ".parquet" else path.stat().st_size


def chunks(path: Path) -> Iterator[Chunk]:
    """The file in pieces of bounded size."""
    if path.suffix == ".parquet":
        yield from tables.parquet(path)
    elif path.suffix == ".json" and _is_array(path):
        yield from _array(path)
    else:
        size = path.stat().st_size
        for start in range(0, size, CHUNK_BYTES):
            yield JsonLines(str(path), start, min(start + CHUNK_BYTES, size))


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return json_rows.begins_array(file)


def _array(path: Path) -> Iterator[Inline]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from grouped(str(path), json_rows.array(file, str(path)))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}; write it again as UTF-8") from None
