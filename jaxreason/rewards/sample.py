"""What a reward function is given."""

import dataclasses
from collections.abc import Callable
from typing import Any

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One finished completion. Lengths are tokens; texts come without special tokens, but keep ``<think>``."""

    prompt: str  # the prompt as the model saw it, which may end with an opened <think>
    completion: str
    gold: str | None  # the reference answer of the prompt's row
    completion_tokens: int
    max_completion_tokens: int
    truncated: bool  # the completion ran into max_completion_tokens before a stop token
    row: dict[str, Any] | None = None  # further columns of the prompt's row

    @property
    def transcript(self) -> str:
        """The assistant's whole turn: the completion, preceded by ``<think>`` where the prompt ends with it."""
        opened = self.prompt.rstrip().endswith(THINK_OPEN)
        return f"{THINK_OPEN}\n{self.completion}" if opened else self.completion


def batch(function: Callable) -> Callable:
    """Marks a reward function that takes a list of samples and returns as many rewards, in their order."""
    function.batch = True
    return function


def final_span(sample: Sample) -> str | None:
    """The text after the last ``</think>``, the only place where an answer counts; None while thinking is unclosed.

    A turn without any think tag is one span. Tags in the user's text cannot matter: the prompt is not searched.
    """
    _, closed, after = sample.transcript.rpartition(THINK_CLOSE)
    span = after if closed else sample.transcript
    return None if THINK_OPEN in span else span
