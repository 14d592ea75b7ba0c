"""Packed rows as batches, addressed by step: the data order is a function of the seed and nothing is stateful."""

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from jaxreason.data.mixture import Shares
from jaxreason.data.pack import Packing, pack
from jaxreason.data.store import Store
from jaxreason.types import Batch


@dataclasses.dataclass(frozen=True)
class Order:
    """How examples become rows: several in one (``packing``), and in a new order each epoch, from the seed (``shuffle``)."""

    packing: bool
    shuffle: bool
    seed: int


class Piece(NamedTuple):
    """One example in a row."""

    ids: np.ndarray  # [n] tokens
    start: int  # the first that is trained
    answer: int  # the first after the thought


def assemble(
    rows: Sequence[Sequence[Piece]], first_row: int, length: int, pad_id: int, weights: tuple[float, float] | None
) -> Batch[np.ndarray]:
    """Rows ``first_row``, … of a step as arrays [len(rows), length]; ``weights``: of a thought's targets, and of the rest."""
    shape = (len(rows), length)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    positions, segments, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    token_weights = None if weights is None else np.ones(shape, np.float32)
    of_thought, of_answer = weights or (1.0, 1.0)
    for r, pieces in enumerate(rows):
        at = 0
        for segment, piece in enumerate(pieces, 1):
            end = at + len(piece.ids)
            tokens[r, at:end] = piece.ids
            targets[r, at : end - 1] = piece.ids[1:]
            positions[r, at:end] = np.arange(len(piece.ids))
            segments[r, at:end] = segment
            # Position t is trained to say token t + 1, so the mask begins one before the trained span.
            mask[r, at + piece.start - 1 : end - 1] = 1
            if token_weights is not None:
                answer = min(at + piece.answer - 1, end)
                token_weights[r, at:answer], token_weights[r, answer:end] = of_thought, of_answer
            at = end
    # Each row holds fewer than T segments, so a row's ids cannot reach the next row's.
    sequence_ids = (np.arange(first_row, first_row + len(rows), dtype=np.int32)[:, None] * length) + segments
    return Batch(tokens, targets, positions, segments, mask, sequence_ids=sequence_ids, token_weights=token_weights)


class Rows:
    """Rows of T tokens from a store, as batches.

    With ``endless`` the epochs follow each other without a seam: the batch that ends one epoch is filled from the
    next. Without, there is one epoch, and the last batch is filled with empty rows. ``weights``: of the targets of a
    thought, and of what follows it. ``shares``: which of the examples an epoch holds; None: all.
    """

    def __init__(
        self,
        store: Store,
        index: np.ndarray,
        lengths: np.ndarray,
        *,
        length: int,
        batch_size: int,
        order: Order,
        pad_id: int,
        endless: bool,
        weights: tuple[float, float] | None = None,
        shares: Shares | None = None,
    ):
        self.length, self.batch_size, self.endless = length, batch_size, endless
        self.index, self.lengths = index, lengths
        self._store, self._pad_id, self.weights = store, pad_id, weights
        self._order, self._shares = order, shares
        self._lock = threading.Lock()  # grain reads steps from threads
        self._packings: dict[int, Packing] = {}
        self._ends: list[int] = []  # rows in epochs 0..e together

    def rows_per_epoch(self, epoch: int = 0) -> int:
        end = self._end(epoch)
        return end - (self._end(epoch - 1) if epoch else 0)

    def examples_per_epoch(self) -> int:
        return len(self.lengths) if self._shares is None else len(self._shares)

    def filled(self) -> float:
        """Tokens of the first epoch over what its rows have room for."""
        made = self._packing(0)
        return float(self.lengths[made.order].sum() / (len(made) * self.length))

    def num_steps(self, epochs: float = 1.0) -> int:
        """Optimizer steps that cover ``epochs`` passes."""
        whole = math.floor(epochs)
        rows = self._end(whole - 1) if whole else 0
        if epochs > whole:
            rows += math.ceil((epochs - whole) * self.rows_per_epoch(whole))
        return math.ceil(rows / self.batch_size)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        return self.num_steps(epoch + 1) - self.num_steps(epoch)

    def max_segments(self, steps: int) -> int:
        """Most segments in a row of the first ``steps`` batches; what a row has left at its end is one more."""
        epoch = most = 0
        while epoch == 0 or (self.endless and self._end(epoch - 1) < steps * self.batch_size):
            made = self._packing(epoch)
            most, epoch = max(most, int(np.diff(made.bounds).max(initial=0))), epoch + 1
        return most + 1

    def examples(self, row: int) -> np.ndarray:
        """Positions in ``index`` and ``lengths`` of the examples in row ``row`` of the endless stream."""
        epoch = 0
        while row >= self._end(epoch):
            epoch += 1
            if not self.endless:
                return np.zeros(0, np.int64)
        first = self._end(epoch - 1) if epoch else 0
        return self._packing(epoch).row(row - first)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch[np.ndarray]:
        """This process's rows of step ``step``: numpy arrays [batch_size / process_count, T].

        Sequence ids are unique in the whole step, over all processes. Raises IndexError after the last batch of rows
        that end.
        """
        if self.batch_size % process_count:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by {process_count} processes")
        if step < 0 or (not self.endless and step >= self.num_steps()):
            raise IndexError(f"step {step} of {self.num_steps()}")
        share = self.batch_size // process_count
        first = step * self.batch_size
        rows = [self.examples(first + row) for row in range(process_index * share, (process_index + 1) * share)]
        pieces = [[self.piece(example) for example in row] for row in rows]
        return assemble(pieces, process_index * share, self.length, self._pad_id, self.weights)

    def piece(self, example: int) -> Piece:
        """Example at a position in ``index`` and ``lengths``."""
        length, stored = int(self.lengths[example]), int(self.index[example])
        start, answer = int(self._store.starts[stored]), int(self._store.answers[stored])
        return Piece(self._store.example(stored)[:length], start, answer)

    def _end(self, epoch: int) -> int:
        while len(self._ends) <= epoch:
            self._packing(len(self._ends))
        return self._ends[epoch]

    def _packing(self, epoch: int) -> Packing:
        with self._lock:
            if epoch not in self._packings:
                chosen = np.arange(len(self.lengths)) if self._shares is None else self._shares.epoch(epoch)
                made = pack(self.lengths[chosen], self.length, epoch=epoch, **vars(self._order))
                made = dataclasses.replace(made, order=chosen[made.order])
                self._packings = {e: p for e, p in self._packings.items() if abs(e - epoch) == 1} | {epoch: made}
                if len(self._ends) == epoch:
                    self._ends.append((self._ends[-1] if epoch else 0) + len(made))
            return self._packings[epoch]


class _Steps:
    """Steps of rows as the random-access source that grain reads."""

    def __init__(self, rows: Rows, num_steps: int, process_index: int, process_count: int):
        self.rows, self.num_steps = rows, num_steps
        self.process = process_index, process_count

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch[np.ndarray]:
        return self.rows.batch(step, *self.process)

    def __repr__(self) -> str:
        return f"_Steps(num_steps={self.num_steps})"


class Batches(Protocol):
    """An iterator over batches that tells where it is, and goes on from there."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> Batch[np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def loader(
    rows: Rows,
    num_steps: int,
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    prefetch: int = 2,
) -> Batches:
    """A grain iterator over the batches of steps start_step … num_steps - 1, made ahead in threads.

    Its ``get_state()`` is a small JSON-able dict for the checkpoint and ``set_state()`` goes on from there. Threads
    suffice: the tokens are in the system's cache and assembling a batch is copying.
    """
    import grain

    steps = grain.MapDataset.source(_Steps(rows, num_steps, process_index, process_count))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
    iterator = iter(steps.to_iter_dataset(options))
    if start_step:
        iterator.set_state({"next_index": start_step})
    return iterator
