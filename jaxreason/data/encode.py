"""Examples to token ids and the start of the trained span; this module is what tokenizing processes run.

ids = encode(prompt) + encode(completion), built from these two pieces, so the prompt's ids are a prefix of the
example's by construction and equal what generation feeds the model.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxreason.data.chat import Chat
from jaxreason.data.chunks import Chunk
from jaxreason.data.example import Example, Reject
from jaxreason.data.schema import format_of, parse
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.errors import UserError
from jaxreason.text import THINK_CLOSE


class Rejected(NamedTuple):
    ordinal: int
    reason: str
    key: int
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The examples of one chunk, flat. Ordinals count the chunk's rows from 0; keys find a row for a message."""

    ids: np.ndarray  # [sum of lengths] int32
    lengths: np.ndarray  # [n] int32
    starts: np.ndarray  # [n] int32, first trained token
    answers: np.ndarray  # [n] int32, first token after the thought; the first trained one where spans are not wanted
    ordinals: np.ndarray  # [n] int64
    rows: int
    rejects: list[Rejected]
    formats: list[str]  # of each row; empty where it has none


@dataclasses.dataclass(frozen=True)
class Encoder:
    tokenizer: Tokenizer
    chat: Chat
    keep_only_correct: bool
    spans: bool = False  # find where the answer begins, after the thought

    def chunk(self, chunk: Chunk, schema: str) -> Encoded:
        """Reads, parses and encodes the rows of ``chunk``. Raises UserError for a file that cannot be read."""
        texts, plain, ordinals, keys, rejects, formats, rows = [], [], [], [], [], [], 0
        for key, row in chunk.rows():
            name = None
            try:
                name = format_of(row, schema)
                example = parse(row, name, self.keep_only_correct)
                texts.append(self._texts(example))
            except Reject as reject:
                rejects.append(Rejected(rows, reject.reason, key, reject.detail))
            else:
                plain.append(example.user is None)
                ordinals.append(rows)
                keys.append(key)
            formats.append(name or "")
            rows += 1
        prompts = self.tokenizer.encode_batch([prompt for prompt, _ in texts])
        completions = self._completions([completion for _, completion in texts], plain)
        thoughts = [self._thought(text, ids) for (_, text), ids in zip(texts, completions)]
        ids, starts, answers, kept = [], [], [], []
        for at, (prompt, completion) in enumerate(zip(prompts, completions)):
            try:
                ids.append(np.array(prompt + end_at_stop(completion, self.tokenizer), np.int32))
            except Reject as reject:
                rejects.append(Rejected(ordinals[at], reject.reason, keys[at], reject.detail))
            else:
                # The very first token has nothing before it that could predict it.
                starts.append(max(len(prompt), 1))
                answers.append(max(len(prompt) + thoughts[at], 1))
                kept.append(ordinals[at])
        return Encoded(
            np.concatenate([*ids, np.zeros(0, np.int32)]),
            np.array([len(row) for row in ids], np.int32),
            np.array(starts, np.int32),
            np.array(answers, np.int32),
            np.array(kept, np.int64),
            rows,
            sorted(rejects),
            formats,
        )

    def _texts(self, example: Example) -> tuple[str, str]:
        if example.answer is None:
            raise Reject("no answer to train on")
        if example.user is None:
            self.chat.check_reply(example.answer)
            return (self.tokenizer.hf.bos_token if self.tokenizer.adds_bos else ""), example.answer
        return self.chat.render(example)

    def _thought(self, text: str, ids: list[int]) -> int:
        """Tokens of a completion up to the one that ends its ``</think>``, included; 0 without a thought."""
        if not self.spans or THINK_CLOSE not in text:
            return 0
        # The fewest tokens whose text holds the tag: texts of prefixes only grow, so halving finds it.
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if THINK_CLOSE in self.tokenizer.decode(ids[:middle]) else (middle + 1, high)
        return low

    def _completions(self, texts: list[str], plain: list[bool]) -> list[list[int]]:
        """Plain text begins a document and is encoded as one; a reply continues its prompt."""
        whole = iter(self.tokenizer.encode_batch([text for text, alone in zip(texts, plain) if alone]))
        replies = iter(self.tokenizer.encode_continuations([text for text, alone in zip(texts, plain) if not alone]))
        return [next(whole if alone else replies) for alone in plain]


def end_at_stop(completion: list[int], tokenizer: Tokenizer) -> list[int]:
    """The completion up to its first stop token, included; the tokenizer's EOS where the template writes none.

    What a template writes after the stop token (a line break) is never generated and so not trained. Raises Reject
    where text follows: the row itself holds a stop token and would teach the model to end early.
    """
    stops = np.flatnonzero(tokenizer.is_stop[completion])
    if not len(stops):
        eos = tokenizer.hf.eos_token_id
        return [*completion, tokenizer.stop_ids[0] if eos is None else eos]
    at = int(stops[0])
    tail = completion[at + 1 :]
    if tail and tokenizer.decode(tail).strip():
        raise Reject("stop token inside the text")
    return completion[: at + 1]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Which examples are used, and how long."""

    index: np.ndarray  # [n] int64, examples kept
    lengths: np.ndarray  # [n] int32, tokens used of each
    truncated: int
    dropped: dict[str, int]


def fit(lengths: np.ndarray, starts: np.ndarray, max_length: int, over_length: str, source: str) -> Fit:
    """Applies ``data.over_length``. A truncated example ends without a stop token, since it did not stop there.

    Raises UserError for a longer example under ``error``.
    """
    long = lengths > max_length
    if over_length == "error" and long.any():
        at = int(np.argmax(long))
        raise UserError(
            f"{source}: {int(long.sum())} examples are longer than data.max_length={max_length}, e.g. example {at} of "
            f"{lengths[at]} tokens; raise data.max_length or set data.over_length=drop or truncate"
        )
    if over_length == "drop":
        keep, dropped = ~long, {"longer than max_length": int(long.sum())}
    else:
        keep = starts < max_length
        dropped = {"prompt fills max_length, nothing left to train": int((~keep).sum())}
    index = np.flatnonzero(keep)
    used = np.minimum(lengths[index], max_length).astype(np.int32)
    return Fit(index, used, int((lengths[index] > max_length).sum()), {k: n for k, n in dropped.items() if n})
