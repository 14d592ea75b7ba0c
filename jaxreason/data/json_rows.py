"""Rows of JSON: one a line, or the objects of one array. JSON that is no row is rejected by reason; what is no JSON is damage."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TextIO

from jaxreason.data.chunks import CHUNK_BYTES, Item, Row
from jaxreason.data.example import Reject
from jaxreason.errors import UserError

MAX_ROW_BYTES = 32 << 20  # the longest traces of reasoning data sets, several to a row, are a few MB
MAX_DEPTH = 64  # of lists and objects in each other

_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+(?P<closed>")?|(?P<opens>[\[{])|[\]}]', re.DOTALL)
_SEPARATOR = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """The lines of a file that begin in bytes [start, stop)."""

    origin: str
    start: int
    stop: int

    @property
    def weight(self) -> int:
        return self.stop - self.start

    def rows(self) -> Iterator[tuple[int, Item]]:
        with open(self.origin, "rb") as file:
            if self.start:
                file.seek(self.start - 1)
                _end_line(file)  # the line before began in the chunk before
            while (at := file.tell()) < self.stop:
                line = read_line(file)
                if isinstance(line, Reject) or line.strip():
                    yield at, row_of(line, lambda: self.place(at))

    def place(self, key: int) -> str:
        line = 1
        with open(self.origin, "rb") as file:
            while (left := key - file.tell()) > 0:
                line += file.read(min(left, 1 << 20)).count(b"\n")
        return f"{self.origin}, line {line}"


def lines(file: BinaryIO, origin: str) -> Iterator[tuple[Item, int]]:
    """(row, its bytes) of every line that is not blank, from a file that can only be read from its beginning."""
    number = 0
    while line := read_line(file):
        number += 1
        if isinstance(line, Reject):
            yield line, MAX_ROW_BYTES
        elif line.strip():
            yield row_of(line, lambda: f"{origin}, line {number}"), len(line)  # noqa: B023  (called at once)


def array(file: TextIO, origin: str) -> Iterator[tuple[Item, int]]:
    """(row, its characters) of one JSON array, decoded one after the other from a growing buffer, never the whole file."""
    buffer, want, line = file.read(CHUNK_BYTES).lstrip(), CHUNK_BYTES, 1
    at = 1  # after the "["
    while True:
        begin = _after_separator(buffer, at)
        if buffer[begin : begin + 1] == "]":
            return
        found = _element(buffer, begin)
        if isinstance(found, json.JSONDecodeError):
            more = file.read(want)
            want *= 2  # so that one huge element is not parsed again for every few bytes
            if not more:
                line += buffer.count("\n", 0, found.pos)
                raise UserError(f"{origin}, about line {line}: not valid JSON: {found.msg}; the file may be cut short")
            line += buffer.count("\n", 0, at)
            buffer, at = buffer[at:] + more, 0
            continue
        row, at = found
        yield row, at - begin


def begins_array(file: BinaryIO) -> bool:
    """Whether the first character of a JSON file, after a byte order mark, opens an array."""
    byte = file.read(3).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] or file.read(1)
    while byte.isspace():
        byte = file.read(1)
    return byte == b"["


def row_of(line: bytes | Reject, place: Callable[[], str]) -> Row | Reject:
    """The row that a line holds. Raises UserError, with its place, for a line that is no JSON."""
    if isinstance(line, Reject):
        return line
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        cut = "" if line.endswith(b"\n") else ", and the file ends there: it may be cut short"
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"{place()}: not valid JSON: {detail}{cut}; repair or remove the line") from None
    except (ValueError, RecursionError) as error:
        return _unreadable(error)
    return _checked(value, line.count(b"[") + line.count(b"{"))


def read_line(file: BinaryIO) -> bytes | Reject:
    """The next line with its end; of a longer one than ``MAX_ROW_BYTES`` only that it is, read and forgotten."""
    line = file.readline(MAX_ROW_BYTES + 1)
    if len(line) <= MAX_ROW_BYTES:
        return line
    if not line.endswith(b"\n"):
        _end_line(file)
    return _too_long()


def _end_line(file: BinaryIO) -> None:
    while (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


def _element(buffer: str, begin: int) -> tuple[Row | Reject, int] | json.JSONDecodeError:
    """The array's element at ``begin`` and where it ends; an error where the buffer ends before it does."""
    try:
        value, end = _DECODER.raw_decode(buffer, begin)
    except json.JSONDecodeError as error:
        return error
    except (ValueError, RecursionError) as error:
        stop = _end_of(buffer, begin)
        return json.JSONDecodeError("the element has no end", buffer, begin) if stop is None else (_unreadable(error), stop)
    if end - begin > MAX_ROW_BYTES:
        return _too_long(), end
    return _checked(value, buffer.count("[", begin, end) + buffer.count("{", begin, end)), end


def _end_of(buffer: str, begin: int) -> int | None:
    """Where the list or object at ``begin`` ends, by its brackets outside of strings; None: after the buffer."""
    depth = 0
    for token in _TOKEN.finditer(buffer, begin):
        if token[0][0] == '"':
            if token["closed"] is None:
                return None
            continue
        depth += 1 if token["opens"] else -1
        if depth <= 0:
            return token.end()
    return None


def _after_separator(buffer: str, at: int) -> int:
    matched = _SEPARATOR.match(buffer, at)
    assert matched is not None  # the pattern also matches no character
    return matched.end()


def _checked(value: Any, brackets: int) -> Row | Reject:
    if not isinstance(value, dict):
        return Reject("not an object with columns", f"a {type(value).__name__}")
    if brackets > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        return _too_deep()
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in value)


def _unreadable(error: Exception) -> Reject:
    # The only other ValueError of the decoder is Python's own limit of the digits that it turns into an integer.
    return _too_deep() if isinstance(error, RecursionError) else Reject(
        f"an integer of more than {sys.get_int_max_str_digits()} digits"
    )  # fmt: skip


def _too_deep() -> Reject:
    return Reject(f"lists and objects in each other more than {MAX_DEPTH} deep")


def _too_long() -> Reject:
    return Reject(f"longer than {MAX_ROW_BYTES / (1 << 20):g} MiB")
