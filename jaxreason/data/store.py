"""Tokenized examples on disk: flat, and complete or absent."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxreason.data.directory import SUMS, check_sums, read_json, write_sums
from jaxreason.data.encode import Encoded
from jaxreason.errors import UserError
from jaxreason.locks import Partial
from jaxreason.terminal import console

FORMAT = 5  # part of every cache key; raise it when parsing, rendering or this layout changes


class TokenFile:
    """The tokens of a file, read a slice at a time.

    The file stays open, so that it may be removed meanwhile. It is not memory-mapped: where a mapped file is cut, or its disk
    fails, the system ends the process without a word (SIGBUS).
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self._file, self._dtype = open(path, "rb"), dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        """Tokens ``part.start`` to ``part.stop``. Raises UserError where the file has been cut."""
        count, size = int(part.stop - part.start), self._dtype.itemsize
        found = os.pread(self._file.fileno(), count * size, int(part.start) * size)
        if len(found) != count * size:
            raise UserError(f"{self._file.name}: was cut while it was read; run the same command again, which makes it again")
        return np.frombuffer(found, self._dtype)


class Tokens(Protocol):
    """What gives tokens a slice at a time: an array, or a file."""

    def __getitem__(self, part: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Store:
    """Example i is ``tokens[offsets[i]:offsets[i + 1]]``, trained from its token ``starts[i]`` on."""

    tokens: Tokens  # [sum of lengths] uint16 or uint32
    offsets: np.ndarray  # [n + 1] int64
    starts: np.ndarray  # [n] int32
    answers: np.ndarray  # [n] int32, first token after the thought
    rows: np.ndarray  # [n] int64, ordinal of the row in its source
    meta: dict  # rows, rejects {reason: {count, first}}, formats {name: rows}, dtype, content: a digest of the arrays

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def example(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class Writer:
    """Builds a store in a temporary folder and renames that to its final place, so that a reader finds all of it or nothing."""

    def __init__(self, final: Path, vocab_size: int):
        self.final = final
        try:
            self.partial = Partial(final, all_targets=True)
            self.temporary = self.partial.path
        except OSError as error:
            raise UserError(f"{final.parent}: cannot write tokenized data: {error}; set data.cache_dir") from None
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.file = open(self.temporary / "tokens.bin", "wb")
        self.parts: list[Encoded] = []
        self.content = hashlib.sha256()

    def add(self, part: Encoded, first_row: int) -> None:
        try:
            (ids := part.ids.astype(self.dtype)).tofile(self.file)
        except OSError as error:
            raise UserError(f"{self.temporary}: {error}; free some space or set data.cache_dir") from None
        self.content.update(ids)
        self.parts.append(
            dataclasses.replace(part, ids=part.ids[:0], ordinals=part.ordinals + first_row, rejects=[], formats=[])
        )

    def commit(self, meta: dict) -> None:
        self.file.close()
        lengths = np.concatenate([part.lengths for part in self.parts] or [np.zeros(0, np.int32)])
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        empty = [np.zeros(0, np.int64)]
        starts = np.concatenate([part.starts for part in self.parts] or empty).astype(np.int32)
        answers = np.concatenate([part.answers for part in self.parts] or empty).astype(np.int32)
        rows = np.concatenate([part.ordinals for part in self.parts] or empty).astype(np.int64)
        np.savez(self.temporary / "index.npz", offsets=offsets, starts=starts, answers=answers, rows=rows)
        for array in (offsets, starts, answers):
            self.content.update(array)
        meta = {**meta, "dtype": np.dtype(self.dtype).name, "content": self.content.hexdigest()}
        (self.temporary / "meta.json").write_text(json.dumps(meta))
        write_sums(self.temporary)
        try:
            self.partial.commit()
        except OSError:
            # Another run built the same data meanwhile; anything else is a real failure.
            if not (self.final / "meta.json").is_file():
                raise
            self.discard()

    def discard(self) -> None:
        self.file.close()
        self.partial.discard()


def open_store(path: Path) -> Store | None:
    """The store at ``path``, or None where there is none, and where what is there is damaged: that is said and removed."""
    if not path.is_dir():
        return None
    try:
        if not (path / SUMS).is_file():
            raise UserError(f"{path / SUMS}: missing")
        check_sums(path, lambda name: True)
    except UserError as error:
        console.print(f"tokenized data are made again: {error}", markup=False)
        shutil.rmtree(path)
        return None
    meta = read_json(path / "meta.json")
    with np.load(path / "index.npz") as index:
        offsets, starts, answers, rows = (index[name] for name in ("offsets", "starts", "answers", "rows"))
    tokens = TokenFile(path / "tokens.bin", np.dtype(meta["dtype"]))
    return Store(tokens, offsets, starts, answers, rows, meta)
