"""What a task is: where its rows are, how they are read and asked, how answers are read, and who grades them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from jaxreason.data.example import Example
from jaxreason.errors import UserError

Protocol = Literal["direct", "cot"]
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row, read."""

    question: str
    gold: str  # what the grader compares with
    choices: tuple[str, ...] = ()  # texts, in the order of their letters
    solution: str | None = None  # worked, without its final answer: what a chain of thought is shown as
    group: str | None = None  # examples are shown to problems of the same group (a subject)
    row: Row | None = None  # columns that a grader reads
    numbers: tuple[int, ...] = ()  # of a puzzle that a search takes apart
    target: int | None = None  # what they are to make

    @property
    def digest(self) -> str:
        """Tells it from other problems, wherever it is in its file."""
        state = json.dumps([self.question, self.choices, self.gold], ensure_ascii=False)
        return hashlib.sha256(state.encode()).hexdigest()[:16]


def _question(problem: Problem) -> str:
    return problem.question


def _gold(problem: Problem) -> str:
    return problem.gold


@dataclasses.dataclass(frozen=True)
class Family:
    """How tasks of one kind are asked and answered."""

    direct: str  # the instruction after the question: an answer alone
    cot: str  # a chain of thought first (arXiv 2201.11903)
    parse: Callable[[str, Problem], str | None]  # (final span, problem) -> answer
    grader: str  # a reward by name, which sees the answer alone as the completion
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    show: Callable[[Problem], str] = _question
    answer: Callable[[Problem], str] = _gold  # the answer of an example that is shown


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set in its own row format, or a program that writes problems.

    ``read`` raises ``Reject`` for a row that is no problem. ``source`` is a hub id, ``owner/name:config``; a local file or
    directory with the same columns takes its place.
    """

    name: str
    family: Family
    read: Callable[[Row], Problem] | None = None
    source: str = ""
    split: str = "test"
    shots: str | None = None  # the split of examples that are shown
    generate: Callable[[], Iterator[Problem]] | None = None
    about: str = ""


def ask(family: Family, problem: Problem, protocol: Protocol, shots: tuple[Problem, ...] = ()) -> Example:
    """The conversation that asks: examples as earlier turns, then the question with the protocol's instruction.

    Raises UserError for a chain of thought from examples without a worked solution.
    """
    history: list[tuple[str, str]] = []
    for shot in shots:
        if protocol == "cot" and shot.solution is None:
            raise UserError(
                "protocol=cot with shots shows worked solutions, which these rows lack; use protocol=direct, or shots_from= "
                "rows that have them"
            )
        reply = f"The answer is {family.answer(shot)}."
        reply = f"{shot.solution}\n{reply}" if protocol == "cot" else reply
        history += [("user", _turn(family, shot, protocol)), ("assistant", reply)]
    return Example(_turn(family, problem, protocol), history=tuple(history), gold=problem.gold, row=problem.row)


def _turn(family: Family, problem: Problem, protocol: Protocol) -> str:
    return f"{family.show(problem)}\n\n{family.direct if protocol == 'direct' else family.cot}"
