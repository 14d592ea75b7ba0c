"""Prompts with golds for GRPO and evaluation, from the same rows and through the same template as SFT."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason.config import Problems
from jaxreason.data import chat as chats
from jaxreason.data.chat import Chat
from jaxreason.data.encode import end_at_stop
from jaxreason.data.example import Example, Reject
from jaxreason.data.files import Chunk
from jaxreason.data.schema import parse
from jaxreason.data.sources import open_source
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.data.tokenizing import row_formats
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
class Prompts:
    """Usable prompts in the source's order, and what became of the other rows."""

    prompts: tuple[Prompt, ...]
    rows: int
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, at: int) -> Prompt:
        return self.prompts[at]

    @property
    def fingerprint(self) -> str:
        """A digest of all that a rollout and a grader read, in order: other prompts are another run."""
        state = hashlib.sha256()
        for prompt in self.prompts:
            row = None if prompt.row is None else json.dumps(prompt.row, default=repr, sort_keys=True)
            state.update(repr((len(prompt.ids), prompt.text, prompt.gold, row)).encode())
            state.update(np.array([*prompt.ids, *prompt.reply_ids], np.int32))
        return state.hexdigest()[:32]


class PromptStream:
    """The endless stream of epochs of prompts, each in its own order.

    Epoch e has the order ``numpy.random.default_rng([seed, e]).permutation(n)``, or the source's without ``shuffle``.
    """

    def __init__(self, prompts: Prompts, seed: int, shuffle: bool):
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def at(self, cursor: int) -> Prompt:
        """Prompt number ``cursor`` of the stream, from 0."""
        epoch, place = divmod(cursor, len(self._prompts))
        if not self._shuffle:
            return self._prompts[place]
        if epoch != self._epoch:  # the order of 400,000 prompts takes 30 ms: once an epoch, not once a prompt
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
            self._epoch, self._order = epoch, order
        return self._prompts[int(self._order[place])]


def load_prompts(
    data: Problems, tokenizer: Tokenizer, seed: int, *, max_prompt_tokens: int | None = None, chat: Chat | None = None,
    max_reply_tokens: int | None = None,
) -> Prompts:  # fmt: skip
    """Prompts of ``data.source``; rows without a gold, or longer than ``max_prompt_tokens``, are counted.

    Only prompts are held in memory, not the rows' answers, unless ``max_reply_tokens`` asks for them; rows without an answer,
    or with a longer one, are then counted, too. Raises UserError where no row is usable.
    """
    chat = chat or chats.of_data(data, tokenizer)
    source = open_source(data.source, data.split, data.max_rows, seed)
    prompts: list[Prompt] = []
    dropped: collections.Counter[str] = collections.Counter()
    rows = 0
    for chunk, schema in row_formats(source, data.row_schema, keep_only_correct=False):
        found, read = _examples(chunk, _FORMAT.get(schema, schema), rows, data, dropped)
        texts = _rendered(found, chat, dropped)
        for (index, example, gold), text, ids in zip(found, texts, tokenizer.encode_batch(texts)):
            if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
                dropped[f"prompt longer than {max_prompt_tokens} tokens"] += 1
                continue
            prompt = Prompt(
                tuple(ids), without_marks(text), gold, example.question, index, example.row, example.system, example.history
            )
            try:
                if max_reply_tokens is not None:
                    prompt = _with_reply(prompt, example, chat, tokenizer, max_reply_tokens)
                prompts.append(prompt)
            except Reject as reject:
                dropped[reject.reason] += 1
        rows += read
        if rows == data.max_rows:
            break
    if not prompts:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "none read"
        raise UserError(f"data.source {data.source}: no usable prompt in {rows} rows ({reasons}); check data.schema")
    return Prompts(tuple(prompts), rows, dict(dropped))


def _with_reply(prompt: Prompt, example: Example, chat: Chat, tokenizer: Tokenizer, longest: int) -> Prompt:
    """The prompt with the row's own answer. Raises Reject."""
    ids = end_at_stop(tokenizer.encode(chat.render(example)[1]), tokenizer)
    if len(ids) > longest:
        raise Reject(f"answer longer than {longest} tokens")
    return dataclasses.replace(prompt, reply=example.reply, reply_ids=tuple(ids))


def _rendered(found: list[tuple[int, Example, str]], chat: Chat, dropped: collections.Counter[str]) -> list[str]:
    """The prompts' texts; what cannot be rendered is taken out of ``found`` and counted."""
    texts, kept = [], []
    for item in found:
        try:
            texts.append(chat.render_prompt(item[1]))
            kept.append(item)
        except Reject as reject:
            dropped[reject.reason] += 1
    found[:] = kept
    return texts


def _examples(
    chunk: Chunk, schema: str, first: int, data: Problems, dropped: collections.Counter[str]
) -> tuple[list[tuple[int, Example, str]], int]:
    """(ordinal, example, gold) of the chunk's usable rows, and how many rows were read."""
    found, read = [], 0
    for key, row in chunk.rows():
        if first + read == data.max_rows:
            break
        try:
            example = row if isinstance(row, Example) else parse(row, schema, False)
            if data.keep_columns and not isinstance(row, Example):
                example = dataclasses.replace(example, row=_columns(row, data.keep_columns, chunk.place(key)))
            if example.user is None:
                raise Reject("plain text asks nothing")
            if example.gold is None:
                raise Reject("no gold answer")
            found.append((first + read, example, example.gold))
        except Reject as reject:
            dropped[reject.reason] += 1
        read += 1
    return found, read


def _columns(row: Mapping[str, Any], names: Sequence[str], place: str) -> dict[str, Any]:
    if missing := [name for name in names if name not in row]:
        raise UserError(f"{place}: data.keep_columns names {missing[0]}, which the row lacks; it has {', '.join(row)}")
    return {name: row[name] for name in names}
