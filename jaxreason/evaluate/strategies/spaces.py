"""What a tree of thoughts is searched over: puzzles of numbers, whose rules are known, and free texts."""

import dataclasses
import re
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any, Protocol

from jaxreason.data.example import Example
from jaxreason.evaluate.ask import Query, Reply, Turn

VALUES = {"sure": 20.0, "likely": 1.0, "impossible": 0.001}  # of the paper's code (arXiv 2305.10601)
_WORD = re.compile("|".join(VALUES))
_BEST = re.compile(r"best choice is\D*([0-9]+)", re.IGNORECASE)
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})


@dataclasses.dataclass(frozen=True)
class State:
    """A node's content. States of one ``key`` are as good as each other: one is kept, and its value is asked for once."""

    key: Hashable
    text: str  # the way here, for people and for a vote
    inner: Any
    end: str | None = None  # the finished turn, where it is an end
    solved: bool = False  # by the rules of the puzzle


class Space(Protocol):
    """Where thoughts lead."""

    depth: int

    def root(self) -> State: ...

    def grow(self, state: State) -> Turn:
        """What asks for next thoughts."""
        ...

    def children(self, state: State, replies: Sequence[Reply]) -> list[State]:
        """The states that the replies lead to, in their order; what breaks the rules leads nowhere."""
        ...

    def judge(self, state: State) -> Turn:
        """What asks how good a state is, in one of the words of ``VALUES``."""
        ...


def value(texts: Sequence[str]) -> float:
    """Mean of the judges' values; the last of the words counts, and a judge that says none of them counts 0."""
    found = [_WORD.findall(text.lower()) for text in texts]
    return sum(VALUES[words[-1]] if words else 0.0 for words in found) / len(texts)


def ballot(query: Query, states: Sequence[State]) -> Turn:
    """What asks for the best of several states."""
    listed = "\n".join(f"Choice {i}:\n{state.text}" for i, state in enumerate(states, 1))
    return Turn(Example(
        f"{query.example.question}\n\nHere are several ways to go on:\n{listed}\n\nDecide which of them is most promising. End "
        'with "The best choice is N", where N is its number.', system=query.example.system,
    ))  # fmt: skip


def counted(texts: Sequence[str], choices: int) -> list[float]:
    """Votes for each choice; a text that names none of them has no vote."""
    votes = [0.0] * choices
    for text in texts:
        named = _BEST.findall(text)
        if named and 1 <= int(named[-1]) <= choices:
            votes[int(named[-1]) - 1] += 1
    return votes


@dataclasses.dataclass(frozen=True)
class _Left:
    """Numbers that are left, each with the expression that made it, in ascending order; and the steps so far."""

    numbers: tuple[tuple[Fraction, str], ...]
    steps: tuple[str, ...] = ()


class Numbers:
    """Countdown and the game of 24: a step takes two of the numbers and puts their result in their place.

    A proposed step counts where both numbers are there and its result is right; the numbers that are left are computed
    here, and one number that is the target is the solution.
    """

    def __init__(self, query: Query):
        assert query.target is not None  # of a puzzle
        self._query, self._target, self.depth = query, Fraction(query.target), len(query.numbers) - 1

    def root(self) -> State:
        return self._state(_Left(tuple(sorted((Fraction(n), str(n)) for n in self._query.numbers))))

    def _state(self, left: _Left) -> State:
        values = tuple(number for number, _ in left.numbers)
        lines = [*left.steps, f"left: {' '.join(map(str, values))}"]
        solved = values == (self._target,)
        end = f"The answer is {_bare(left.numbers[0][1])}" if len(values) == 1 else None
        return State(values, "\n".join(lines), left, end, solved)

    def grow(self, state: State) -> Turn:
        return Turn(Example(
            f"Numbers: {_listed(state)}. Combine two of them with + - * or /, so that {self._target} can be made of the result "
            'and the others in the end. Write several possible next steps, each on a line of its own as "a + b = c".',
            system=self._query.example.system,
        ))  # fmt: skip

    def judge(self, state: State) -> Turn:
        return Turn(Example(
            f"Numbers: {_listed(state)}. Can they make {self._target} with + - * /, each used once? End with one word: sure, "
            "likely or impossible.", system=self._query.example.system,
        ))  # fmt: skip

    def children(self, state: State, replies: Sequence[Reply]) -> list[State]:
        lines = [line for reply in replies for line in reply.text.split("\n")]
        return [self._state(left) for line in lines if (left := _step(state.inner, line)) is not None]


_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?(?:/[0-9]+)?)"
_STEP = re.compile(rf"{_NUMBER}\s*([-+*/])\s*{_NUMBER}\s*=\s*{_NUMBER}(?![0-9./])")


def _step(left: _Left, line: str) -> _Left | None:
    match = _STEP.search(line.translate(_SIGNS))
    if match is None:
        return None
    pool = list(left.numbers)
    taken = []
    try:
        for text in (match[1], match[3]):
            at = next((i for i, (number, _) in enumerate(pool) if number == Fraction(text)), None)
            if at is None:
                return None
            taken.append(pool.pop(at))
        (a, first), (b, second) = taken
        result = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[match[2]]()
        if result != Fraction(match[4]):
            return None
    except ZeroDivisionError:
        return None
    made = (result, f"({first} {match[2]} {second})")
    return _Left(tuple(sorted([*pool, made])), (*left.steps, match[0]))


def _bare(expression: str) -> str:
    return expression[1:-1] if expression.startswith("(") else expression


def _listed(state: State) -> str:
    return ", ".join(str(number) for number, _ in state.inner.numbers)


class Free:
    """Any question: a thought is the next line of the answer, and an answer ends where the model ends its turn."""

    def __init__(self, query: Query, depth: int):
        self._query, self.depth = query, depth

    def root(self) -> State:
        return State((), "", ())

    def grow(self, state: State) -> Turn:
        return Turn(self._query.example, ("\n".join(state.inner) + "\n",) if state.inner else ())

    def judge(self, state: State) -> Turn:
        return Turn(Example(
            f"{self._query.example.question}\n\nSomebody begins to answer:\n{state.text}\n\nDoes this lead to a right answer? "
            "End with one word: sure, likely or impossible.", system=self._query.example.system,
        ))  # fmt: skip

    def children(self, state: State, replies: Sequence[Reply]) -> list[State]:
        return [found for reply in replies if (found := self._child(state, reply)) is not None]

    def _child(self, state: State, reply: Reply) -> State | None:
        line, more, _ = reply.text.lstrip("\n").partition("\n")
        if not line.strip():
            return None
        steps = (*state.inner, line)
        text = "\n".join(steps)
        ended = not more and not reply.truncated
        return State(steps, text, steps, text if ended else None)
