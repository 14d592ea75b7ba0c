"""Many searches asking one model: what they ask at the same time is drawn together, and what it costs is counted.

A search is a generator. It yields an ``Ask`` and gets the replies, as often as it likes, and returns its final texts; a
plain answer asks once, a tree of thoughts at every level. All searches of a block move in step, so that the engine draws
one large batch a round, each prompt prefilled once for all of its samples.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

from jaxreason.data.chat import Chat, Refused
from jaxreason.data.example import Example, Reject
from jaxreason.data.tokenizer import Tokenizer
from jaxreason.errors import UserError
from jaxreason.rewards.sample import Sample
from jaxreason.sampler import Completion, Job, Sampler, Sampling
from jaxreason.sampler.protocol import Progress

_KINDS = 16  # ways of sampling that one round may have, which draw different noise
_SPREAD = 4096  # numbers of prompts that one problem may take in a round after its first


@dataclasses.dataclass(frozen=True)
class Turn:
    """The assistant's turn of a conversation, which may be begun: token ids as they were drawn, and texts."""

    example: Example
    begun: tuple[int | str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ask:
    """Turns to complete, all in one way."""

    turns: tuple[Turn, ...]
    sampling: Sampling
    samples: int = 1


@dataclasses.dataclass(frozen=True)
class Reply:
    """What was drawn of a turn, without what was begun and without the stop token."""

    text: str
    tokens: tuple[int, ...]
    truncated: bool
    logp: float  # sum of the tokens' log-probs, the stop token included
    drawn: int  # tokens, the stop token included


@dataclasses.dataclass(frozen=True)
class Final:
    """One answer of a search: the whole assistant's turn."""

    text: str
    truncated: bool = False
    tokens: tuple[int, ...] = ()  # as drawn, where it was drawn in one piece
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # a tree, votes: plain values, kept as JSON


Search = Generator[Ask, list[list[Reply]], tuple[Final, ...]]


@dataclasses.dataclass(frozen=True)
class Query:
    """What a strategy knows of a problem. The right answer is not among it."""

    example: Example
    sampling: Sampling
    samples: int
    answer: Callable[[str], str | None]  # the answer that a finished turn gives
    decode: Callable[[Sequence[int]], str]
    rate: Callable[[str, Sequence[str]], list[float]]  # a reward's name and finished turns -> their scores
    opened: bool = False  # the template has opened a thought
    numbers: tuple[int, ...] = ()  # of a puzzle of numbers
    target: int | None = None
    seed: int = 0


@dataclasses.dataclass
class Outcome:
    """The final texts of a search, and what they cost."""

    finals: tuple[Final, ...] = ()
    drawn: int = 0  # tokens
    read: int = 0  # tokens of prompts, each counted once a call
    calls: int = 0  # prompts


@dataclasses.dataclass(frozen=True)
class Model:
    """A sampler with weights, and how it is talked to."""

    sampler: Sampler
    tokenizer: Tokenizer
    chat: Chat
    seed: int
    slots: int

    def encode(self, turn: Turn) -> tuple[int, ...]:
        """The ids that the turn is completed from. Raises UserError for a text that holds a control token."""
        try:
            ids = self.tokenizer.encode(self.chat.render_prompt(turn.example))
        except Refused:
            raise
        except Reject as reject:
            raise UserError(f"the prompt holds {reject.reason}; leave it out") from None
        for part in turn.begun:
            ids += self.tokenizer.encode_continuations([part])[0] if isinstance(part, str) else [part]
        return tuple(ids)

    def reply(self, completion: Completion) -> Reply:
        tokens = completion.tokens if completion.truncated else completion.tokens[:-1]
        ids = tuple(int(token) for token in tokens)
        logp = float(completion.policy_logp.sum())
        return Reply(self.tokenizer.decode(ids), ids, completion.truncated, logp, len(completion.tokens))

    def run(self, searches: Sequence[Search], first: int, progress: Progress | None = None) -> list[Outcome]:
        """Runs searches of problems ``first``, ``first + 1`` … to their ends.

        The noise of what problem p asks in round r is a function of the seed, r, p and the place among what p's block asks in
        that round: the same searches from the same ``first`` draw the same texts.
        """
        outcomes, asks = [Outcome() for _ in searches], {}
        for index, search in enumerate(searches):
            asks[index] = _advance(search, None, outcomes[index])
        number = 0
        while asks := {index: ask for index, ask in asks.items() if ask is not None}:
            replies = self._round(asks, first, number, outcomes, progress)
            asks = {index: _advance(searches[index], replies[index], outcomes[index]) for index in asks}
            number += 1
        return outcomes

    def _round(
        self, asks: dict[int, Ask], first: int, number: int, outcomes: list[Outcome], progress: Progress | None
    ) -> dict[int, list[list[Reply]]]:
        kinds: dict[tuple[Sampling, int], list[int]] = {}
        for index, ask in asks.items():
            kinds.setdefault((ask.sampling, ask.samples), []).append(index)
        replies: dict[int, list[list[Reply]]] = {}
        for kind, ((sampling, samples), members) in enumerate(kinds.items()):
            prompts = [(index, self.encode(turn)) for index in members for turn in asks[index].turns]
            start = first if number == 0 else first * _SPREAD
            job = Job(sampling, samples, self.seed, number * _KINDS + kind, self.slots, start)
            found = self.sampler.generate([ids for _, ids in prompts], job, progress)
            for index in members:
                replies[index] = []
            for at, (index, ids) in enumerate(prompts):
                mine = [self.reply(completion) for completion in found[at * samples : (at + 1) * samples]]
                replies[index].append(mine)
                outcomes[index].read += len(ids)
                outcomes[index].calls += 1
                outcomes[index].drawn += sum(reply.drawn for reply in mine)
        return replies


def _advance(search: Search, replies: list[list[Reply]] | None, outcome: Outcome) -> Ask | None:
    """What the search asks next; None where it has ended, with its final texts in ``outcome``."""
    try:
        return next(search) if replies is None else search.send(replies)
    except StopIteration as end:
        outcome.finals = end.value
        return None


def sample_of_text(prompt: str, text: str, final: Final | None, gold: str | None, limit: int, row: Any = None) -> Sample:
    """A finished turn as a reward function reads it."""
    tokens = final.tokens if final else ()
    return Sample(prompt, text, gold, len(tokens), limit, bool(final and final.truncated), row, tokens)
