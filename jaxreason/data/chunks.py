"""Pieces of a source, of bounded size, that any process can read alone; and what a row is before it is an Example."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from jaxreason.data.example import Example, Reject

CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 512

Row = dict[str, Any]
Item = Row | Example | Reject  # Reject: what stands there is no row, and why


class Chunk(Protocol):
    """Some rows of a source."""

    @property
    def weight(self) -> int:
        """Of the source's ``total``, for progress."""

    def rows(self) -> Iterator[tuple[int, Item]]:
        """(key, row) pairs; ``place(key)`` names the row for a message. Raises UserError for a damaged file."""

    def place(self, key: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class Inline:
    """Rows that were read already."""

    origin: str
    first: int
    items: tuple[Item, ...]
    weight: int

    def rows(self) -> Iterator[tuple[int, Item]]:
        yield from enumerate(self.items)

    def place(self, key: int) -> str:
        return f"{self.origin}, row {self.first + key + 1}"


def grouped(origin: str, rows: Iterable[tuple[Item, int]]) -> Iterator[Inline]:
    """``rows``, each with its size in bytes, as chunks whose weight is that of their bytes."""
    items: list[Item] = []
    first = weight = 0
    for row, size in rows:
        items.append(row)
        weight += size
        if len(items) >= CHUNK_ROWS or weight >= CHUNK_BYTES:
            yield Inline(origin, first, tuple(items), weight)
            items, first, weight = [], first + len(items), 0
    if items:
        yield Inline(origin, first, tuple(items), weight)
