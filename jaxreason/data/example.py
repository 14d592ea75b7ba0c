"""The record that every row becomes, and the text conventions of the data sets it comes from."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxreason.text import THINK_CLOSE, THINK_OPEN

_THOUGHT_TAGS = ((THINK_OPEN, THINK_CLOSE), ("<|begin_of_thought|>", "<|end_of_thought|>"))
NESTED = "think tags inside the thought or the answer"
_SURROGATE = re.compile("[\ud800-\udfff]")
_SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")


class Reject(Exception):
    """This row cannot be used. The reason is a short phrase, since reports count rows by it; ``detail`` is of this row alone."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation whose last assistant turn is trained (SFT) or asked for (GRPO).

    ``user=None`` is plain text without roles: all of ``answer`` is trained and no chat template is applied.
    """

    user: str | None
    answer: str | None = None
    think: str | None = None  # the thought without its tags; None: the answer has no thought
    system: str | None = None
    gold: str | None = None  # what a grader compares with
    history: tuple[tuple[str, str], ...] = ()  # earlier (role, text) turns, never trained
    row: Mapping[str, Any] | None = None  # further columns, for a reward function that reads them

    @property
    def question(self) -> str:
        """The user's text. Raises Reject for plain text, which has none."""
        if self.user is None:
            raise Reject("plain text asks nothing")
        return self.user

    @property
    def reply(self) -> str | None:
        """The assistant's text: ``<think>\\n{think}\\n</think>\\n\\n{answer}``, or the answer alone."""
        if self.answer is None or self.think is None:
            return self.answer
        return f"{THINK_OPEN}\n{self.think}\n{THINK_CLOSE}\n\n{self.answer}"


def split_thought(text: str) -> tuple[str | None, str]:
    """(think, answer) of an assistant's text in any of the known tag styles, both stripped; think None without tags.

    A closing tag without an opening one counts as a thought, because some templates write the opening tag into the
    prompt. Tags in the middle of an answer without a thought are ordinary text. Raises Reject for a thought that never ends,
    for a missing answer, and for further tags in the thought or after it: which of them are meant nobody can tell.
    """
    text = text.strip()
    for opening, closing in _THOUGHT_TAGS:
        if text.startswith(opening):
            think, closed, answer = text.removeprefix(opening).partition(closing)
            if not closed:
                raise Reject("thought never ends")
        elif opening not in text and closing in text:
            think, _, answer = text.partition(closing)
        else:
            continue
        if opening in think + answer or closing in answer:
            raise Reject(NESTED)
        return think.strip(), _solution(answer)
    return None, _solution(text)


def check(example: Example) -> Example:
    """The example, if its texts can be encoded and its thought ends where its tag says. Raises Reject."""
    texts = [example.user, example.answer, example.think, example.system, example.gold, *(text for _, text in example.history)]
    if any(text is not None and _SURROGATE.search(text) for text in texts):
        raise Reject("half of a character (a lone surrogate)")
    if example.think is not None and any(tag in f"{example.think} {example.answer}" for tag in (THINK_OPEN, THINK_CLOSE)):
        raise Reject(NESTED)
    return example


def _solution(text: str) -> str:
    opening, closing = _SOLUTION_TAGS
    text = text.strip()
    if text.startswith(opening):
        text = text.removeprefix(opening).partition(closing)[0].strip()
    if not text:
        raise Reject("no answer after the thought")
    return text
