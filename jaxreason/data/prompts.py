"""Prompts with golds for GRPO and evaluation, from the same rows and through the same template as SFT."""

import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxreason.config import Portion, Problems
from jaxreason.data import chat as chats
from jaxreason.data.chat import Chat
from jaxreason.data.chunks import Chunk
from jaxreason.data.encode import end_at_stop
from jaxreason.data.example import Example, Reject
from jaxreason.data.mixture import Shares, portions
from jaxreason.data.report import formats_line, unread_line
from jaxreason.data.schema import format_of, known, parse
from jaxreason.data.sources import open_source
from jaxreason.data.tally import Tally, reasons
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.errors import UserError
from jaxreason.text import without_marks

# A row whose generations are all unusable for SFT is still a problem to solve.
_FORMAT = {"openr1": "problem_answer"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]  # what generation starts from
    text: str  # the same, rendered
    gold: str  # what a grader compares with
    user: str  # the question alone
    index: int  # ordinal of the row in its source
    row: Mapping[str, Any] | None = None  # the columns of data.keep_columns, or the entry of a reasoning-gym task
    system: str | None = None  # the row's own system message
    history: tuple[tuple[str, str], ...] = ()  # its earlier turns
    reply: str | None = None  # its own answer with the thought, where it was asked for
    reply_ids: tuple[int, ...] = ()  # what the model would have to generate to give it

    def instead(self, user: str) -> Example:
        """The conversation with another last turn of the user."""
        return Example(user, system=self.system, history=self.history)


@dataclasses.dataclass(frozen=True)
class SourceRows:
    """What became of the rows of a source."""

    source: str
    weight: float  # passes over it in an epoch
    kept: int
    tally: Tally
    unread: tuple[str, ...] = ()  # files of the source that are not read, with why

    def report(self) -> dict[str, Any]:
        """JSON-able, for data_report.json."""
        tally = self.tally
        rows = {"source": self.source, "formats": dict(tally.formats), "rows": tally.rows, "kept": self.kept}
        return rows | {"dropped": tally.dropped, "first_dropped": tally.first_dropped, "unread": list(self.unread)}

    def table(self, several: bool) -> list[tuple[str, str]]:
        """Lines of the table at the start; of one among ``several`` with its name and weight."""
        tally = self.tally
        name = f"of {self.source}, weight {self.weight:g}: " if several else ""
        lines = [("problems", f"{name}{self.kept:,} of {tally.rows:,} rows ({formats_line(tally.formats)})")]
        lines += [(f"dropped: {reason}", f"{n:,}, first: {tally.first_dropped[reason]}") for reason, n in tally.dropped.items()]
        return lines + ([("files not read", unread_line(self.unread))] if self.unread else [])


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Usable prompts, source by source and in each one's order, and what became of the other rows."""

    prompts: tuple[Prompt, ...]
    sources: tuple[SourceRows, ...]

    @property
    def rows(self) -> int:
        return sum(source.tally.rows for source in self.sources)

    @property
    def dropped(self) -> dict[str, int]:
        return dict(sum((collections.Counter(source.tally.dropped) for source in self.sources), collections.Counter()))

    def __len__(self) -> int:
        return len(self.prompts)

    def report(self) -> dict[str, Any]:
        """JSON-able, for data_report.json: what became of the rows of every source."""
        return {"sources": [source.report() for source in self.sources]}

    def shares(self, seed: int, shuffle: bool) -> Shares:
        """Which of the prompts an epoch holds."""
        sizes, weights = zip(*((source.kept, source.weight) for source in self.sources))
        return Shares(sizes, weights, seed, shuffle)

    def __getitem__(self, at: int) -> Prompt:
        return self.prompts[at]

    @property
    def fingerprint(self) -> str:
        """A digest of all that a rollout and a grader read, in order: other prompts are another run."""
        state = hashlib.sha256()
        if len(self.sources) > 1:
            state.update(repr([(source.kept, source.weight) for source in self.sources]).encode())
        for prompt in self.prompts:
            row = None if prompt.row is None else json.dumps(prompt.row, default=repr, sort_keys=True)
            state.update(repr((len(prompt.ids), prompt.text, prompt.gold, row)).encode())
            state.update(np.array([*prompt.ids, *prompt.reply_ids], np.int32))
        return state.hexdigest()[:32]


class PromptStream:
    """The endless stream of epochs of prompts, each in its own order.

    Epoch e has the order ``numpy.random.default_rng([seed, e]).permutation(n)`` of its prompts, or the source's without
    ``shuffle``. Of one source these are all; of several, :class:`~jaxreason.data.mixture.Shares` says which.
    """

    def __init__(self, prompts: Prompts, seed: int, shuffle: bool):
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._shares = prompts.shares(seed, shuffle)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def at(self, cursor: int) -> Prompt:
        """Prompt number ``cursor`` of the stream, from 0."""
        epoch, place = divmod(cursor, len(self._shares))
        if epoch != self._epoch:  # the order of 400,000 prompts takes 30 ms: once an epoch, not once a prompt
            order = self._shares.epoch(epoch)
            if self._shuffle:
                order = order[np.random.default_rng([self._seed, epoch]).permutation(len(order))]
            self._epoch, self._order = epoch, order
        return self._prompts[int(self._order[place])]


def load_prompts(
    data: Problems, tokenizer: Tokenizer, seed: int, *, max_prompt_tokens: int | None = None, chat: Chat | None = None,
    max_reply_tokens: int | None = None,
) -> Prompts:  # fmt: skip
    """Prompts of ``data.source`` and ``data.mixture``; rows without a gold, or longer than ``max_prompt_tokens``, are counted.

    Only prompts are held in memory, not the rows' answers, unless ``max_reply_tokens`` asks for them; rows without an answer,
    or with a longer one, are then counted, too. Raises UserError where no row is usable.
    """
    chat = chat or chats.of_data(data, tokenizer)
    prompts: list[Prompt] = []
    sources = []
    for portion in portions(data):
        found, rows = _of_source(data, portion, tokenizer, seed, chat, max_prompt_tokens, max_reply_tokens)
        prompts += found
        sources.append(rows)
    return Prompts(tuple(prompts), tuple(sources))


def _of_source(
    data: Problems, portion: Portion, tokenizer: Tokenizer, seed: int, chat: Chat, max_prompt_tokens: int | None,
    max_reply_tokens: int | None,
) -> tuple[list[Prompt], SourceRows]:  # fmt: skip
    known(portion.row_schema)
    source = open_source(portion.source, portion.split, portion.max_rows, seed, data.streaming)
    prompts: list[Prompt] = []
    tally = Tally()
    for chunk in source.chunks():
        found = _examples(chunk, portion, data.keep_columns, tally)
        texts = _rendered(found, chat, tally)
        for row, text, ids in zip(found, texts, tokenizer.encode_batch(texts)):
            example = row.example
            prompt = Prompt(
                tuple(ids), without_marks(text), row.gold, example.question, row.ordinal, example.row, example.system,
                example.history,
            )  # fmt: skip
            try:
                if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
                    raise Reject(f"prompt longer than {max_prompt_tokens} tokens")
                if max_reply_tokens is not None:
                    prompt = _with_reply(prompt, example, chat, tokenizer, max_reply_tokens)
                prompts.append(prompt)
            except Reject as reject:
                tally.reject(reject, row.place)
        if tally.rows == portion.max_rows:
            break
    if not prompts:
        told = reasons(tally.dropped, tally.first_dropped)
        raise UserError(f"data.source {portion.source}: no usable prompt in {tally.rows} rows {told}; check data.schema")
    return prompts, SourceRows(portion.source, portion.weight, len(prompts), tally, source.unread)


class _Found(NamedTuple):
    ordinal: int  # of the row in its source
    example: Example
    gold: str
    place: Callable[[], str]


def _with_reply(prompt: Prompt, example: Example, chat: Chat, tokenizer: Tokenizer, longest: int) -> Prompt:
    """The prompt with the row's own answer. Raises Reject."""
    ids = end_at_stop(tokenizer.encode(chat.render(example)[1]), tokenizer)
    if len(ids) > longest:
        raise Reject(f"answer longer than {longest} tokens")
    return dataclasses.replace(prompt, reply=example.reply, reply_ids=tuple(ids))


def _rendered(found: list[_Found], chat: Chat, tally: Tally) -> list[str]:
    """The prompts' texts; what cannot be rendered is taken out of ``found`` and counted."""
    texts, kept = [], []
    for row in found:
        try:
            texts.append(chat.render_prompt(row.example))
            kept.append(row)
        except Reject as reject:
            tally.reject(reject, row.place)
    found[:] = kept
    return texts


def _examples(chunk: Chunk, portion: Portion, keep: Sequence[str], tally: Tally) -> list[_Found]:
    """The chunk's usable rows; all of them are counted."""
    found = []
    for key, row in chunk.rows():
        if tally.rows == portion.max_rows:
            break
        place = functools.partial(chunk.place, key)
        try:
            name = format_of(row, portion.row_schema)
            tally.formats[name] += 1
            example = parse(row, _FORMAT.get(name, name), False)
            if keep and isinstance(row, dict):
                example = dataclasses.replace(example, row=_columns(row, keep))
            if example.user is None:
                raise Reject("plain text asks nothing")
            if example.gold is None:
                raise Reject("no gold answer")
            found.append(_Found(tally.rows, example, example.gold, place))
        except Reject as reject:
            tally.reject(reject, place)
        tally.rows += 1
    return found


def _columns(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    if missing := [name for name in names if name not in row]:
        raise Reject(f"no column {missing[0]}, which data.keep_columns names", f"it has {', '.join(list(row)[:12])}")
    return {name: row[name] for name in names}
