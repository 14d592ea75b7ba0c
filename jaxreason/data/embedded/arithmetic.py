"""Short word and number problems with worked answers: the embedded default.

Two kinds of prompts and two styles of thinking make room for reinforcement learning. *Careful* thinking works digit by
digit, which a million parameters learn in minutes; *terse* thinking states the result at once, which they cannot learn.
Every trace ends in the right answer, but the traces of bare number problems are mostly terse: after fine-tuning, a
greedy model works the stories out and guesses the numbers, and a reward can teach it to work those out as well.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from random import Random
from typing import TypeVar

from jaxreason.data.example import Example
from jaxreason.errors import UserError

LOWEST, HIGHEST = 10, 199  # every partial result lies between: at most three digits, and never a leading zero
Choice = TypeVar("Choice")
EVAL_SHARE = 8  # one expression in eight is held out


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Parameters of the task, as in ``embedded:arithmetic?operations=3&careful=0.5``. Fractions are in [0, 1].

    Attributes:
      operations: most additions and subtractions in a problem; each has between 2 and this many (2 to 4).
      bare: fraction of problems that are bare numbers ("Compute 37 + 48 - 19."); the others are stories.
      careful: fraction of the stories whose trace is careful.
      careful_bare: fraction of the bare problems whose trace is careful.
      slips: fraction of the careful traces in which one step goes wrong, is noticed and is done again.
      checks: fraction of the careful traces that undo the last operation to check the result.
    """

    operations: int = 2
    bare: float = 0.4
    careful: float = 0.9
    careful_bare: float = 0.3
    slips: float = 0.1
    checks: float = 0.3

    def __post_init__(self):
        if not 2 <= self.operations <= 4:
            raise UserError(f"embedded:arithmetic: operations is {self.operations}; give 2, 3 or 4")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "operations" and not 0 <= value <= 1:
                raise UserError(f"embedded:arithmetic: {field.name} is {value}; it is a fraction between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Problem:
    """``numbers[0] ± numbers[1] ± …``; ``signs[i]`` (+1 or -1) is written before ``numbers[i + 1]``."""

    numbers: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def results(self) -> list[int]:
        """Running results, first number first; the last one is the answer."""
        results = [self.numbers[0]]
        for sign, number in zip(self.signs, self.numbers[1:]):
            results.append(results[-1] + sign * number)
        return results

    def expression(self, space: str = "") -> str:
        terms = [f"{space}{_symbol(sign)}{space}{number}" for sign, number in zip(self.signs, self.numbers[1:])]
        return str(self.numbers[0]) + "".join(terms)

    @property
    def split(self) -> str:
        """``eval`` or ``train``, decided by the expression alone: no wording of a held-out problem is trained."""
        digest = hashlib.sha256(self.expression().encode()).digest()
        return "eval" if digest[0] % EVAL_SHARE == 0 else "train"


@dataclasses.dataclass(frozen=True)
class Story:
    """Wordings of a story; ``{n}`` is a number, ``{who}`` a person, ``{what}`` the things counted."""

    opening: str
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    question: str
    what: tuple[str, ...]


STORIES = (
    Story(
        "{who} has {n} {what}, ",
        ("buys {n} more", "finds {n}", "gets {n}"),
        ("gives away {n}", "loses {n}", "sells {n}"),
        "How many {what} are left?",
        ("apples", "books", "cards", "coins", "pens", "shells"),
    ),
    Story(
        "A {what} has {n} people on board. Then ",
        ("{n} get on", "{n} join"),
        ("{n} get off", "{n} leave"),
        "How many are on the {what} now?",
        ("boat", "bus", "train"),
    ),
    Story(
        "A shop has {n} {what}. It ",
        ("makes {n} more", "orders {n}"),
        ("sells {n}", "throws away {n}"),
        "How many {what} does it have?",
        ("cakes", "hats", "lamps", "toys"),
    ),
    Story(
        "{who} has {n} dollars in the {what}, ",
        ("earns {n}", "saves {n}"),
        ("spends {n}", "pays {n}"),
        "How many dollars are there now?",
        ("bank", "jar", "purse"),
    ),
)
BARE = ("Compute {x}.", "What is {x}?", "Find {x}.", "{x} = ?")
PEOPLE = ("Ana", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe")
# One first word for all: greedy decoding then meets terse thinking as one choice, with its whole probability.
GUESSES = ("That is {x}.", "That makes {x}.", "That must be {x}.")


def problems(task: Arithmetic, split: str, rng: Random) -> Iterator[Problem]:
    """Endless problems of one split, no expression twice."""
    seen = set()
    while True:
        count = 2 + _below(rng, task.operations - 1)
        numbers = tuple(10 + _below(rng, 90) for _ in range(count + 1))
        signs = tuple(1 - 2 * _below(rng, 2) for _ in range(count))
        problem = Problem(numbers, signs)
        if not all(LOWEST <= result <= HIGHEST for result in problem.results):
            continue
        if problem not in seen and problem.split == split:
            seen.add(problem)
            yield problem


def ask(problem: Problem, bare: bool, rng: Random) -> str:
    """The problem in words."""
    if bare:
        return _pick(rng, BARE).format(x=problem.expression(" "))
    story = _pick(rng, STORIES)
    who, what = _pick(rng, PEOPLE), _pick(rng, story.what)
    events = [_pick(rng, story.gains if sign > 0 else story.losses).format(n=number)
              for sign, number in zip(problem.signs, problem.numbers[1:])]  # fmt: skip
    opening = story.opening.format(who=who, what=what, n=problem.numbers[0])
    return f"{opening}{', '.join(events[:-1])} and {events[-1]}. {story.question.format(what=what)}"


def work(problem: Problem, slip: bool, check: bool, rng: Random) -> str:
    """Careful thinking: a line for each operation, ones first, then tens with the carry or borrow, then the result.

    ``37+48: 7+8=15, 3+4+1=8, 85``. Each step needs a table of small sums and digits that are close by. A slip is one
    wrong result, followed by "wait" and the step again; a check undoes the last operation.
    """
    results = problem.results
    wrong = _below(rng, 2 * len(problem.signs)) if slip else None
    lines = []
    for i, (sign, number) in enumerate(zip(problem.signs, problem.numbers[1:])):
        parts = list(digit_steps(results[i], sign, number))
        if wrong is not None and wrong // 2 == i:
            parts[wrong % 2] = _slipped(*parts[wrong % 2], rng)
        (ones, ones_result), (tens, tens_result) = parts
        head = f"{results[i]}{_symbol(sign)}{number}"
        lines.append(f"{head}: {ones}={ones_result}, {tens}={tens_result}, {results[i + 1]}")
    if check:
        sign, number = problem.signs[-1], problem.numbers[-1]
        lines.append(f"check: {results[-1]}{_symbol(-sign)}{number}={results[-2]}")
    return "\n".join(lines)


def digit_steps(left: int, sign: int, right: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """The sums of ones and tens of ``left ± right``, as (expression, result) each; the carry is the last term."""
    ones_left, ones_right = left % 10, right % 10
    borrow = sign < 0 and ones_left < ones_right
    ones_left += 10 * borrow
    ones = ones_left + sign * ones_right
    moved = int(borrow or (sign > 0 and ones >= 10))
    symbol = _symbol(sign)
    tens_text = f"{left // 10}{symbol}{right // 10}" + f"{symbol}1" * moved
    tens = left // 10 + sign * (right // 10 + moved)
    return (f"{ones_left}{symbol}{ones_right}", str(ones)), (tens_text, str(tens))


def guess(problem: Problem, rng: Random) -> str:
    """Terse thinking: the result without the way to it."""
    return _pick(rng, GUESSES).format(x=problem.results[-1])


def generate(task: Arithmetic, split: str, seed: int) -> Iterator[Example]:
    """Endless examples with a thought, ``\\boxed{N}`` as the answer and ``N`` as the gold.

    Separate streams of randomness: changing how traces are written leaves the questions as they are.
    """
    numbers, wording, style = (
        Random(f"jaxreason/arithmetic/{split}/{seed}/{stream}") for stream in ("problems", "wording", "style")
    )
    for problem in problems(task, split, numbers):
        bare = wording.random() < task.bare
        user = ask(problem, bare, wording)
        careful = style.random() < (task.careful_bare if bare else task.careful)
        slip, check = style.random() < task.slips, style.random() < task.checks
        think = work(problem, slip, check, style) if careful else guess(problem, style)
        gold = str(problem.results[-1])
        yield Example(user, answer=f"\\boxed{{{gold}}}", think=think, gold=gold)


def _slipped(expression: str, result: str, rng: Random) -> tuple[str, str]:
    off = int(result) + 1 - 2 * _below(rng, 2)
    return expression, f"{abs(off)}, wait, {expression}={result}"


def _symbol(sign: int) -> str:
    return "+" if sign > 0 else "-"


def _below(rng: Random, n: int) -> int:
    """Uniform in 0..n-1 from ``random()``, the one method whose sequence Python promises never to change."""
    return int(rng.random() * n)


def _pick(rng: Random, choices: tuple[Choice, ...]) -> Choice:
    return choices[_below(rng, len(choices))]
