"""Which examples share a row: a pure function of lengths, seed and epoch.

So any epoch's rows can be recomputed at any time, and resuming needs only the step.
"""

import bisect
import dataclasses

import numpy as np

from jaxreason.types import MAX_SEGMENTS

MAX_EXAMPLES = MAX_SEGMENTS - 1  # in a row: what is left of it at the end is a segment too

# Examples considered together. Large enough that every row of 128k tokens finds partners, small enough that sorting a
# window does not bring examples of like length together all over the epoch.
_WINDOW = 8192


@dataclasses.dataclass(frozen=True)
class Packing:
    """Row r holds the examples ``order[bounds[r]:bounds[r + 1]]``."""

    order: np.ndarray  # [n] int64
    bounds: np.ndarray  # [rows + 1] int64

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, index: int) -> np.ndarray:
        return self.order[self.bounds[index] : self.bounds[index + 1]]


def pack(lengths: np.ndarray, max_length: int, *, packing: bool, shuffle: bool, seed: int, epoch: int) -> Packing:
    """Rows of at most ``max_length`` tokens and ``MAX_EXAMPLES`` examples; every example in exactly one.

    Shuffled packing is best-fit decreasing within windows of a random order, then a random order of rows. Unshuffled
    packing keeps the file's order and closes a row at the first example that does not fit. O(n log n).
    """
    count = len(lengths)
    if count and int(lengths.max()) > max_length:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit a row of {max_length}")
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(count) if shuffle else np.arange(count)
    if not packing:
        return Packing(order.astype(np.int64), np.arange(count + 1, dtype=np.int64))
    if not shuffle:
        return _flat(_next_fit(lengths, max_length))
    rows = []
    for start in range(0, count, _WINDOW):
        rows += _best_fit(order[start : start + _WINDOW], lengths, max_length)
    return _flat([rows[i] for i in random.permutation(len(rows))])


def _best_fit(window: np.ndarray, lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """Longest first, each into the fullest row that still takes it."""
    window = window[np.argsort(-lengths[window], kind="stable")]
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row) of rows that take more, sorted
    for example, length in zip(window.tolist(), lengths[window].tolist()):
        at = bisect.bisect_left(room, (length, 0))
        if at == len(room):
            free, row = max_length, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(example)
        if free > length and len(rows[row]) < MAX_EXAMPLES:
            bisect.insort(room, (free - length, row))
    return rows


def _next_fit(lengths: np.ndarray, max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free = 0
    for example, length in enumerate(lengths.tolist()):
        if not rows or length > free or len(rows[-1]) == MAX_EXAMPLES:
            rows.append([])
            free = max_length
        rows[-1].append(example)
        free -= length
    return rows


def _flat(rows: list[list[int]]) -> Packing:
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Packing(np.array([example for row in rows for example in row], np.int64), bounds)
