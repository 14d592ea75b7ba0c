"""What a reward function is given, and what it may return besides a number."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxreason import plugins
from jaxreason.text import THINK_CLOSE, THINK_OPEN


@dataclasses.dataclass(frozen=True)
class Sample:
    """One finished completion. Lengths are tokens; texts come without special tokens, but keep ``<think>``."""

    prompt: str  # the prompt as the model saw it, which may end with an opened <think>
    completion: str
    gold: str | None  # the reference answer of the prompt's row
    completion_tokens: int
    max_completion_tokens: int
    truncated: bool  # the completion ran into max_completion_tokens before a stop token
    row: Mapping[str, Any] | None = None  # further columns of the prompt's row
    tokens: tuple[int, ...] = ()  # the completion's ids, the stop token included

    @property
    def transcript(self) -> str:
        """The assistant's whole turn: the completion, preceded by ``<think>`` where the prompt ends with it."""
        opened = self.prompt.rstrip().endswith(THINK_OPEN)
        return f"{THINK_OPEN}\n{self.completion}" if opened else self.completion


@dataclasses.dataclass(frozen=True)
class Scored:
    """A reward together with numbers for every token, which a loss reads as ``inputs.extras[name]``."""

    value: float | None  # None: no reward
    extras: Mapping[str, Sequence[float]]  # name -> one finite number for each of ``sample.tokens``


def reward(*, fills: Iterable[str] = (), batch: bool = False) -> Callable[[Callable], Callable]:
    """Declares a reward function of your own.

    Args:
      fills: the extras that it returns in ``Scored`` for every sample that it has a reward for.
      batch: it takes a list of samples and returns as many results, in their order.
    """

    def declare(function: Callable) -> Callable:
        return plugins.mark(function, fills=tuple(fills), batch=batch)

    return declare


def final_span(sample: Sample) -> str | None:
    """The text after the last ``</think>``, the only place where an answer counts; None while thinking is unclosed.

    A turn without any think tag is one span. Tags in the user's text cannot matter: the prompt is not searched.
    """
    _, closed, after = sample.transcript.rpartition(THINK_CLOSE)
    span = after if closed else sample.transcript
    return None if THINK_OPEN in span else span
