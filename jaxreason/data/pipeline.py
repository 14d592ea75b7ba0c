"""From ``config.Data`` to batches: read, encode, cut to length, split off held-out rows, pack."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from rich.text import Text

from jaxreason.config import Data, Portion, Problems
from jaxreason.data import chat as chats
from jaxreason.data import files, mixture
from jaxreason.data.batches import Batches, Order, Rows, loader
from jaxreason.data.chat import Chat
from jaxreason.data.encode import Encoder, Fit, fit
from jaxreason.data.report import Report, RowsReport, SourceReport, preview, source_report, stream_report
from jaxreason.data.sources import held_out_split, open_source, parts, splits_itself
from jaxreason.data.store import Store
from jaxreason.data.stream import Stream, StreamBatches, store_of
from jaxreason.data.tally import reasons
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.data.tokenizing import cache_root, tokenize
from jaxreason.errors import UserError

_SAMPLE = 512  # examples of a stream that are looked at before it is trained
_EVAL_STREAM = 2**32 - 1  # no epoch's number, so that held-out rows are drawn independently of every order


@dataclasses.dataclass(frozen=True)
class Prepared:
    train: Rows | Stream
    eval: Rows | None
    report: Report
    chat: Chat  # generation must render with the same one, and an export must ship its template
    fingerprint: str  # of the examples as they are trained and held out: another one is another run
    _shown: Callable[[int], list[Text]]

    def preview(self, count: int) -> list[Text]:
        """The first training examples, the trained tokens between ``[[`` and ``]]``."""
        return self._shown(count)

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps of so many passes."""
        assert isinstance(self.train, Rows)  # the config refuses epochs of a stream
        return self.train.num_steps(epochs)

    @contextlib.contextmanager
    def batches(self, num_steps: int, process_index: int, process_count: int) -> Iterator[Batches]:
        """An iterator over this process's batches; what reads ahead for it ends with it."""
        if isinstance(self.train, Rows):
            yield loader(self.train, num_steps, process_index=process_index, process_count=process_count)
            return
        with contextlib.closing(StreamBatches(self.train, num_steps, process_index, process_count)) as found:
            yield found

    def reported(self, batches: Batches) -> dict:
        """data_report.json, with what the batches so far took from a stream."""
        more = {"stream": batches.read()} if isinstance(batches, StreamBatches) else {}
        return self.report.to_dict() | more


def prepare(data: Data, tokenizer: Tokenizer, seed: int, *, progress: bool = True) -> Prepared:
    """Everything that training reads. ``seed`` chooses the held-out examples and the order.

    Raises UserError for a source that cannot be read, for rows of which nothing is left to train, and for the template.
    """
    chat = chats.of_data(data, tokenizer)
    eval_source = eval_split = None
    if data.eval_source is not None or data.eval_split is not None:
        eval_source, eval_split = held_out_source(data)
    if data.streaming:
        return _streamed(data, tokenizer, chat, seed, eval_source, eval_split)
    read = functools.partial(_source, data, tokenizer=tokenizer, chat=chat, seed=seed, progress=progress)
    mixed = mixture.portions(data)
    stores, fits, sources = map(list, zip(*map(read, mixed)))
    store, held_out, train = mixture.joined(stores), None, _joined(fits, stores)
    if eval_source is not None:
        limit = data.eval_rows or None
        of_eval = Portion(source=eval_source, split=eval_split, row_schema=data.row_schema, max_rows=limit)
        eval_store, held_out, of_held_out = read(of_eval)
        sources.append(of_held_out)
    elif data.eval_rows:
        eval_store, (held_out, train) = store, _split(train, data, seed)
    shares = _shares(data, train, stores, seed)

    length = _row_length(data, [train] if held_out is None else [train, held_out])
    make = functools.partial(Rows, length=length, batch_size=data.batch_size, pad_id=tokenizer.pad_id)
    order = Order(data.packing, data.shuffle, seed)
    rows = make(store, train.index, train.lengths, order=order, endless=True, weights=_weights(data), shares=shares)
    eval_rows = None
    if held_out is not None:
        in_order = dataclasses.replace(order, shuffle=False)
        eval_rows = make(eval_store, held_out.index, held_out.lengths, order=in_order, endless=False)
    eval_report = None if eval_rows is None else _rows_report(eval_rows)
    report = Report(tuple(sources), _rows_report(rows), eval_report, chat.origin)
    used = [(store, train)] if held_out is None else [(store, train), (eval_store, held_out)]

    def shown(count: int) -> list[Text]:
        names = [f"row {int(row) + 1}" for row in store.rows[train.index[:count]]]
        return preview([rows.piece(i) for i in range(len(names))], names, tokenizer)

    return Prepared(rows, eval_rows, report, chat, _fingerprint(used, shares), shown)


def _streamed(
    data: Data, tokenizer: Tokenizer, chat: Chat, seed: int, eval_source: str | None, eval_split: str | None
) -> Prepared:
    """Of a source that is read as it is trained: its first rows are read here, to be held out and to see what they are."""
    encoder = Encoder(tokenizer, chat, data.keep_only_correct, spans=_weights(data) is not None)
    source = open_source(data.source, data.split, None, seed, streaming=True)
    stream, own = Stream(data, source, encoder, seed), data.eval_rows if eval_source is None else 0
    held_out = stream.first(own) if own else None
    if held_out is not None:
        if len(held_out.pieces) < own:
            raise UserError(_nothing_left(data, f"{len(held_out.pieces)} examples"))
        stream = stream.without(held_out.end)
    sample = stream.first(min(data.stream_rows, _SAMPLE))
    if not sample.pieces:
        raise UserError(_nothing_left(data, f"{own} examples"))
    filled = len(rows := stream.rows_of(sample.pieces, 0)) * stream.length
    reports = [stream_report(source, sample.read)]
    eval_rows = None
    if eval_source is not None:
        of_eval = Portion(source=eval_source, split=eval_split, row_schema=data.row_schema, max_rows=data.eval_rows or None)
        store, kept, of_held_out = _source(data, of_eval, tokenizer=tokenizer, chat=chat, seed=seed, progress=True)
        reports.append(of_held_out)
    elif held_out is not None:
        store, kept = store_of(held_out.pieces)
    if eval_source is not None or held_out is not None:
        order = Order(data.packing, False, seed)
        eval_rows = Rows(
            store, kept.index, kept.lengths, length=stream.length, batch_size=data.batch_size, order=order,
            pad_id=tokenizer.pad_id, endless=False,
        )  # fmt: skip
    used = sum(len(piece.ids) for row in rows for piece in row)
    of_train = RowsReport(None, None, stream.length, used / filled, data.batch_size, None)
    report = Report(tuple(reports), of_train, None if eval_rows is None else _rows_report(eval_rows), chat.origin)
    fingerprint = stream.fingerprint if eval_rows is None else f"{stream.fingerprint}-{_fingerprint([(store, kept)], None)}"
    names = [f"example {at + 1}" for at in range(len(sample.pieces))]
    return Prepared(stream, eval_rows, report, chat, fingerprint, lambda count: preview(sample.pieces[:count], names, tokenizer))


def _joined(fits: list[Fit], stores: list[Store]) -> Fit:
    """What is used of the stores, end to end."""
    if len(fits) == 1:
        return fits[0]
    firsts = np.cumsum([0, *(len(store.starts) for store in stores)])
    index = np.concatenate([fit.index + first for fit, first in zip(fits, firsts)])
    return Fit(index, np.concatenate([fit.lengths for fit in fits]), sum(fit.truncated for fit in fits), {})


def _shares(data: Data, train: Fit, stores: list[Store], seed: int) -> mixture.Shares | None:
    """How often the sources' rows come, of which some may be held out; None: there is one source."""
    if len(stores) == 1:
        return None
    ends = np.searchsorted(train.index, np.cumsum([len(store.starts) for store in stores]))
    sizes, weights = np.diff(ends, prepend=0).tolist(), [portion.weight for portion in mixture.portions(data)]
    return mixture.Shares(tuple(sizes), tuple(weights), seed, data.shuffle)


def _fingerprint(used: list[tuple[Store, Fit]], shares: mixture.Shares | None) -> str:
    """A digest of the tokens and of which examples are used to what length: no path, time or file format is in it."""
    state = hashlib.sha256()
    if shares is not None:
        state.update(repr((shares.sizes, shares.weights)).encode())
    for store, kept in used:
        state.update(store.meta["content"].encode())
        state.update(kept.index.astype(np.int64))
        state.update(kept.lengths.astype(np.int64))
    return state.hexdigest()[:32]


def _weights(data: Data) -> tuple[float, float] | None:
    """(thought, answer), or None where all targets weigh the same."""
    weights = data.think_weight, data.answer_weight
    return None if weights == (1.0, 1.0) else weights


def held_out_source(data: Problems) -> tuple[str, str | None]:
    """(source, split) of the rows to evaluate on: ``data.eval_source``, or ``data.source``, and ``data.eval_split``.

    Without ``data.eval_split`` it is ``eval`` of a task that a program writes, and the first of ``test``, ``validation`` and
    ``eval`` of a source whose splits have names. Raises UserError where rows are also trained.
    """
    source = data.eval_source or data.source
    split = data.eval_split or held_out_split(source)
    trained = frozenset[str]().union(*(parts(each.source, each.split) for each in mixture.portions(data)))
    if shared := parts(source, split) & trained:
        raise UserError(
            f"data.eval_source {source}: {min(shared)} is what is trained; set data.eval_split or data.eval_source to rows "
            "that are not"
        )
    return source, split


def too_few_rows(data: Data) -> str | None:
    """What is wrong where ``data.eval_rows`` are to be held out of a file that has no more; only so many rows are read."""
    if not data.eval_rows or data.eval_source or data.eval_split or data.mixture:
        return None
    if splits_itself(data.source) or not files.exists(data.source):
        return None
    rows = (1 for chunk in open_source(data.source, data.split, None, 0).chunks() for _ in chunk.rows())
    most = data.eval_rows + 1 if data.max_rows is None else min(data.max_rows, data.eval_rows + 1)
    count = sum(itertools.islice(rows, most))
    return None if count > data.eval_rows else _nothing_left(data, f"{count} rows")


def _nothing_left(data: Data, found: str) -> str:
    return (
        f"data.eval_rows={data.eval_rows} leaves nothing to train: {found} of {data.source}; set data.eval_rows=0 or a smaller "
        "number, or data.eval_source to rows of their own"
    )


def _source(
    data: Data, portion: Portion, *, tokenizer: Tokenizer, chat: Chat, seed: int, progress: bool
) -> tuple[Store, Fit, SourceReport]:
    name = portion.source
    source = open_source(name, portion.split, portion.max_rows, seed, data.streaming)
    store = tokenize(
        source,
        Encoder(tokenizer, chat, data.keep_only_correct, spans=_weights(data) is not None),
        schema=portion.row_schema,
        max_rows=portion.max_rows,
        workers=data.workers,
        cache=cache_root(data.cache_dir),
        progress=progress,
    )
    kept = fit(store.lengths, store.starts, data.max_length, data.over_length, name)
    report = source_report(source, store, kept)
    if not report.trained_tokens:
        raise UserError(
            f"data.source {name}: no trained token in {report.rows} rows, dropped by reason "
            f"{reasons(report.dropped, report.first_dropped)}; check data.schema, data.max_length and data.template"
        )
    return store, kept, report


def _split(kept: Fit, data: Data, seed: int) -> tuple[Fit, Fit]:
    """(held out, trained): a random choice of ``data.eval_rows`` examples, in file order."""
    count = len(kept.index)
    if data.eval_rows >= count:
        raise UserError(_nothing_left(data, f"{count} examples"))
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng([seed, _EVAL_STREAM]).permutation(count)[: data.eval_rows]] = True
    held_out, trained = (
        dataclasses.replace(kept, index=kept.index[part], lengths=kept.lengths[part]) for part in (chosen, ~chosen)
    )
    return held_out, trained


def _row_length(data: Data, fits: list[Fit]) -> int:
    """T. Unpacked rows need only hold the longest example; one length for all steps means one compilation."""
    if data.packing:
        return data.max_length
    longest = max(int(part.lengths.max()) for part in fits)
    return min(-(-longest // 64) * 64, data.max_length)


def _rows_report(rows: Rows) -> RowsReport:
    count = rows.rows_per_epoch()
    return RowsReport(
        examples=rows.examples_per_epoch(),
        rows_per_epoch=count,
        row_length=rows.length,
        packing_efficiency=rows.filled(),
        batch_size=rows.batch_size,
        steps_per_epoch=rows.steps_per_epoch(),
    )
