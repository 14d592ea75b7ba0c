"""Rows of a source that is larger than the disk: read in passes, block after block, and never all of it held.

A block is so many consecutive examples (``data.stream_rows``) of the endless stream of passes over the source's shards; with
``shuffle`` each pass has its own order of shards. Block b is shuffled and packed as an epoch is, by :func:`pack` as number b, and
its rows follow those of the block before. So where a stream is takes a few numbers, and to go on means to read one block again.
Every process reads the whole stream and takes its rows of each batch, so a run may go on with another number of them.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import threading
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple, Self

import numpy as np

from jaxreason.config import Data
from jaxreason.data.batches import Piece, assemble
from jaxreason.data.chunks import CHUNK_BYTES, CHUNK_ROWS, Chunk, Item
from jaxreason.data.encode import Encoded, Encoder, Fit, fit
from jaxreason.data.example import Reject
from jaxreason.data.pack import pack
from jaxreason.data.schema import known
from jaxreason.data.sources import Source
from jaxreason.data.store import FORMAT, Store
from jaxreason.data.tally import Tally, reasons
from jaxreason.data.tokenizing import encode_all
from jaxreason.errors import UserError
from jaxreason.types import MAX_SEGMENTS, Batch

_STREAM = 2**32 - 3  # no epoch's number, so that no order of shards is an epoch's

_MOST_BARREN = 100_000  # rows without a usable one, before a source is refused unread


class Place(NamedTuple):
    """Before which example a stream goes on: pass, place in the pass's order of shards, chunk of that shard, example of that."""

    turn: int = 0
    shard: int = 0
    chunk: int = 0
    example: int = 0


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A chunk, and where in the stream and in the source it is."""

    chunk: Chunk
    at: Place
    shard: int  # of the source

    @property
    def weight(self) -> int:
        return self.chunk.weight

    def rows(self) -> Iterator[tuple[int, Item]]:
        return self.chunk.rows()

    def place(self, key: int) -> str:
        return self.chunk.place(key)


@dataclasses.dataclass
class Read:
    """What became of the rows of some chunks."""

    tally: Tally = dataclasses.field(default_factory=Tally)
    lengths: list[np.ndarray] = dataclasses.field(default_factory=list)  # of all encoded examples
    kept: int = 0
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def counts(self) -> collections.Counter[str]:
        dropped = {f"dropped: {reason}": count for reason, count in self.tally.dropped.items()}
        names = ("kept", "truncated", "tokens", "trained_tokens")
        return collections.Counter({"rows": self.tally.rows, **{name: getattr(self, name) for name in names}, **dropped})


@dataclasses.dataclass
class Block:
    """Consecutive examples of a stream, and where the next one begins."""

    pieces: list[Piece]
    end: Place
    read: Read  # of the chunks that this block is the first to take from


class Stream:
    """The rows of T tokens that a streamed source gives, without those before ``held_out`` in the order of its files."""

    def __init__(self, data: Data, source: Source, encoder: Encoder, seed: int, held_out: Place = Place()):  # noqa: B008
        known(data.row_schema)
        self.length, self.batch_size = data.max_length, data.batch_size
        self.weights = (data.think_weight, data.answer_weight) if encoder.spans else None
        self._data, self._source, self._encoder, self._seed = data, source, encoder, seed
        self._held_out = held_out

    def without(self, held_out: Place) -> "Stream":
        """The same, and no row before ``held_out`` is in any pass."""
        return Stream(self._data, self._source, self._encoder, self._seed, held_out)

    @property
    def fingerprint(self) -> str:
        """Of what decides the batches: names, sizes and tags of the shards, how rows become tokens, where chunks end."""
        chat, encoder = self._encoder.chat, self._encoder
        state = [FORMAT, CHUNK_BYTES, CHUNK_ROWS, [shard.stamp for shard in self._source.shards], encoder.tokenizer.fingerprint]
        state += [chat.template, chat.tokens, chat.system_prompt, chat.control, self._held_out]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]

    def max_segments(self, steps: int) -> int:
        """Most segments that a row can have; what it has left at its end is one."""
        return MAX_SEGMENTS if self._data.packing else 2

    def first(self, count: int) -> Block:
        """The first ``count`` examples in the order of the files; fewer where the source has no more."""
        for block in self._blocks(Place(), count, self._data.workers, shuffle=False, passes=1):
            return block
        return Block([], Place(1), Read())

    def rows_of(self, pieces: list[Piece], number: int) -> list[list[Piece]]:
        """The pieces of block ``number``, as they share rows."""
        data, lengths = self._data, np.array([len(piece.ids) for piece in pieces], np.int64)
        packing = pack(lengths, self.length, packing=data.packing, shuffle=data.shuffle, seed=self._seed, epoch=number)
        return [[pieces[at] for at in packing.row(row)] for row in range(len(packing))]

    def assembled(self, rows: list[list[Piece]], first_row: int) -> Batch[np.ndarray]:
        return assemble(rows, first_row, self.length, self._encoder.tokenizer.pad_id, self.weights)

    def blocks(self, begin: Place, stop: threading.Event) -> Generator[Block, None, None]:
        """The blocks from ``begin`` on, without an end; until ``stop`` is set."""
        return self._blocks(begin, self._data.stream_rows, self._data.workers, shuffle=self._data.shuffle, stop=stop)

    def _blocks(
        self, begin: Place, count: int, workers: int, *, shuffle: bool, passes: int | None = None,
        stop: threading.Event | None = None,
    ) -> Generator[Block, None, None]:  # fmt: skip
        pieces: list[Piece] = []
        read, barren = Read(), begin.turn
        chunks = self._chunks(begin, shuffle, passes)
        for placed, part in encode_all(chunks, self._encoder, self._data.row_schema, workers):
            if stop is not None and stop.is_set():
                return
            assert isinstance(placed, _Placed)
            at, first = placed.at, max(self._first(placed), begin.example if placed.at[:3] == begin[:3] else 0)
            found = self._examples(placed, part, Read() if placed.at[:3] == begin[:3] and begin.example else read)
            if at.turn > barren + 1 or (not pieces and read.tally.rows > _MOST_BARREN and not read.kept):
                self._refuse_barren(read)
            for number in range(first, len(found)):
                pieces.append(found[number])
                barren = at.turn
                if len(pieces) == count:
                    last = number + 1 == len(found)
                    yield Block(pieces, Place(at.turn, at.shard, at.chunk + 1) if last else at._replace(example=number + 1), read)
                    pieces, read = [], Read()
        if pieces:
            yield Block(pieces, Place(passes or 0), read)
        elif passes and read.tally.rows:
            self._refuse_barren(read)

    def _chunks(self, begin: Place, shuffle: bool, passes: int | None) -> Iterator[Chunk]:
        """The chunks from ``begin`` on, pass after pass."""
        skipped, chunk = begin.shard, begin.chunk
        for turn in itertools.count(begin.turn) if passes is None else range(begin.turn, passes):
            order, some = self._order(turn, shuffle), skipped + chunk > 0
            for place in range(skipped, len(order)):
                shard = order[place]
                first = max(chunk, self._held_out.chunk if shard == self._held_out.shard else 0)
                if shard >= self._held_out.shard:
                    for number, found in enumerate(itertools.islice(self._source.shards[shard].chunks(), first, None), first):
                        some = True
                        yield _Placed(found, Place(turn, place, number), shard)
                chunk = 0
            if not some:
                raise UserError(f"data.source {self._source.name}: it holds no rows{self._beyond()}")
            skipped = 0

    def _order(self, turn: int, shuffle: bool) -> list[int]:
        count = len(self._source.shards)
        return np.random.default_rng([self._seed, _STREAM, turn]).permutation(count).tolist() if shuffle else list(range(count))

    def _first(self, placed: _Placed) -> int:
        """The chunk's first example that is not held out."""
        held = self._held_out
        return held.example if (placed.shard, placed.at.chunk) == (held.shard, held.chunk) else 0

    def _examples(self, placed: _Placed, part: Encoded, read: Read) -> list[Piece]:
        """The usable examples of a chunk; what became of its rows is added to ``read``."""
        name, tally = self._source.name, read.tally
        kept = fit(part.lengths, part.starts, self._data.max_length, self._data.over_length, name)
        for reject in part.rejects:
            tally.reject(Reject(reject.reason, reject.detail), functools.partial(placed.place, reject.key))
        for reason, count in kept.dropped.items():
            for _ in range(count):
                tally.reject(Reject(reason), lambda: placed.place(0))
        tally.rows += part.rows
        tally.formats.update(filter(None, part.formats))
        read.lengths.append(part.lengths)
        read.kept += len(kept.index)
        read.truncated += kept.truncated
        read.tokens += int(kept.lengths.sum())
        read.trained_tokens += int((kept.lengths - part.starts[kept.index]).sum())
        offsets = np.concatenate([[0], np.cumsum(part.lengths, dtype=np.int64)])
        return [
            Piece(part.ids[offsets[at] : offsets[at] + length], int(part.starts[at]), int(part.answers[at]))
            for at, length in zip(kept.index.tolist(), kept.lengths.tolist())
        ]

    def _beyond(self) -> str:
        return f" beyond those of data.eval_rows={self._data.eval_rows}: set a smaller number" if self._held_out > Place() else ""

    def _refuse_barren(self, read: Read) -> None:
        raise UserError(
            f"data.source {self._source.name}: no trained token in {read.tally.rows} rows{self._beyond()}, dropped "
            f"by reason {reasons(read.tally.dropped, read.tally.first_dropped)}; check data.schema, "
            "data.max_length and data.template"
        )


class StreamBatches:
    """This process's rows of the steps of a stream. A thread reads the next block while this one is trained.

    ``get_state()`` is where the block of the last batch begins, and how many of its rows were used.
    """

    def __init__(self, stream: Stream, num_steps: int, process_index: int, process_count: int):
        if stream.batch_size % process_count:
            raise ValueError(f"batch_size {stream.batch_size} is not divisible by {process_count} processes")
        self._stream, self._num_steps, self._share = stream, num_steps, stream.batch_size // process_count
        self._first = process_index * self._share
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "stream")
        self._stop, self._step = threading.Event(), 0
        self._next: concurrent.futures.Future[Block] | None = None
        self._go_to(0, Place(), 0, collections.Counter())

    def _go_to(self, number: int, begin: Place, used: int, counts: collections.Counter[str]) -> None:
        """Before row ``used`` of block ``number``, which begins at ``begin``; ``counts``: what was read before it."""
        self._number, self._begin, self._used, self._counts = number, begin, used, counts
        self._rows: list[list[Piece]] | None = None
        self._block: Block | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch[np.ndarray]:
        if self._step >= self._num_steps:
            raise StopIteration
        rows: list[list[Piece]] = []
        while len(rows) < self._stream.batch_size:
            if self._rows is None:
                self._load()
            assert self._rows is not None  # a block was loaded
            if self._used == len(self._rows):
                self._advance()
                continue
            rows.append(self._rows[self._used])
            self._used += 1
        self._step += 1
        own = rows[self._first : self._first + self._share]
        return self._stream.assembled(own, self._first)

    def _load(self) -> None:
        """Reads the block that is wanted, and has the one after it begun."""
        if self._next is None:
            self._blocks = self._stream.blocks(self._begin, self._stop)
            self._next = self._reader.submit(next, self._blocks)
        self._block = self._next.result()
        self._next = self._reader.submit(next, self._blocks)
        self._rows = self._stream.rows_of(self._block.pieces, self._number)

    def _advance(self) -> None:
        assert self._block is not None  # its rows are used up
        self._go_to(self._number + 1, self._block.end, 0, self._counts + self._block.read.counts())

    def get_state(self) -> dict[str, Any]:
        begin = list(self._begin)
        return {"step": self._step, "block": self._number, "begin": begin, "used": self._used, "read": dict(self._counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        assert self._next is None  # nothing was read yet
        self._step = state["step"]
        self._go_to(state["block"], Place(*state["begin"]), state["used"], collections.Counter(state["read"]))

    def read(self) -> dict[str, int]:
        """What became of the rows that the batches so far were made of."""
        return dict(self._counts + (self._block.read.counts() if self._block else collections.Counter()))

    def close(self) -> None:
        """Ends the reading; waits for the chunk that is read just now."""
        self._stop.set()
        if self._next is not None:
            self._next.cancel()
            with contextlib.suppress(BaseException):  # what failed ahead of what was wanted
                self._next.result()
            self._blocks.close()
        self._reader.shutdown()


def store_of(pieces: list[Piece]) -> tuple[Store, Fit]:
    """Examples as a store in memory, all of it used."""
    lengths = np.array([len(piece.ids) for piece in pieces], np.int64)
    tokens, offsets = np.concatenate([piece.ids for piece in pieces]), np.concatenate([[0], np.cumsum(lengths)])
    starts, answers = (np.array([getattr(piece, name) for piece in pieces], np.int32) for name in ("start", "answer"))
    content = hashlib.sha256(b"".join(map(bytes, (tokens, offsets, starts, answers)))).hexdigest()
    index = np.arange(len(pieces))
    return Store(tokens, offsets, starts, answers, index, {"content": content}), Fit(index, lengths.astype(np.int32), 0, {})
