"""Puzzles that grade themselves, and a verdict on somebody else's solution."""

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from jaxreason.data.example import Reject
from jaxreason.evaluate.tasks import parse
from jaxreason.evaluate.tasks.numeric import text_of
from jaxreason.evaluate.tasks.task import Family, Problem, Row, Task

_EXACT = {"answer_in": "text", "symbolic": "never"}
NUMBERS = Family(
    'Give the expression alone, as "The answer is EXPRESSION".',
    'Think step by step. End with a line "The answer is EXPRESSION".',
    parse.equation, "countdown", {"answer_in": "text"},
)  # fmt: skip
SORTED = Family(
    'Give the sorted list alone, as "The answer is [...]".',
    'Think step by step. End with a line "The answer is [...]".', parse.integers, "accuracy", _EXACT,
)  # fmt: skip
VERDICT = Family(
    'Give your verdict alone: "The answer is correct." or "The answer is step N.", where N is the first step with an error.',
    'Check the steps one by one. End with "The answer is correct." if all are right, else with "The answer is step N.", where N '
    "is the first step with an error.",
    parse.first_error, "accuracy", _EXACT,
)  # fmt: skip


def _make(numbers: list, target: Any) -> Problem:
    """Raises Reject for what are no two to eight whole numbers and a whole target."""
    if not 2 <= len(numbers) <= 8 or not all(isinstance(n, int) and not isinstance(n, bool) for n in [*numbers, target]):
        raise Reject("numbers or target are not whole numbers")
    question = (
        f"Combine the numbers {', '.join(map(str, numbers))} into an expression that equals {target}. Use each number exactly "
        "once, with + - * / and parentheses only."
    )
    return Problem(question, json.dumps({"nums": numbers, "target": target}), numbers=tuple(numbers), target=target)


def countdown(row: Row) -> Problem:
    """Jiayi-Pan/Countdown-Tasks-3to4: ``nums``, ``target``."""
    if not isinstance(row.get("nums"), list):
        raise Reject("no nums")
    return _make(row["nums"], row.get("target"))


def game24(row: Row) -> Problem:
    """nlile/24-game: ``numbers``; test-time-compute/game-of-24 and Tree of Thoughts' 24.csv: ``Puzzles``, "1 1 4 6"."""
    if row.get("solvable") is False:
        raise Reject("not solvable")
    numbers = row.get("numbers")
    if not isinstance(numbers, list):
        numbers = [int(word) for word in re.findall(r"[0-9]+", text_of(row, "Puzzles", "puzzles", "numbers"))]
    return _make(numbers, 24)


def mr_gsm8k(row: Row) -> Problem:
    """Randolphzeng/Mr-GSM8K (arXiv 2312.17080): is ``model_output_steps`` right, and if not, which step is the first wrong one?

    What the paper asks in addition, why it is wrong, needs a judge and is not asked.
    """
    steps = row.get("model_output_steps")
    lines = [str(step) for step in steps] if isinstance(steps, list) else text_of(row, "model_output_steps").split("\n")
    lines = [f"Step {i}: {line.strip()}" for i, line in enumerate((line for line in lines if line.strip()), 1)]
    verdict = text_of(row, "model_output_solution_correctness").lower()
    if verdict not in ("correct", "wrong", "incorrect"):
        raise Reject("no verdict")
    gold = verdict if verdict == "correct" else f"step {text_of(row, 'model_output_solution_first_error_step')}"
    if not re.fullmatch("correct|step [0-9]+", gold):
        raise Reject("no step of the first error")
    question = "\n".join(["Here is a question and somebody's solution.", "", text_of(row, "question"), "", *lines])
    return Problem(question, gold)


def sorting(length: int, lowest: int) -> Iterator[Problem]:
    """Endless lists of ``length`` whole numbers from ``lowest`` to 100 (arXiv 2502.11569), always the same ones."""
    rng = np.random.default_rng([length, lowest + 1000])
    while True:
        numbers = [int(n) for n in rng.integers(lowest, 101, length)]
        yield Problem(f"Sort this list of numbers in ascending order: {json.dumps(numbers)}", json.dumps(sorted(numbers)))


TASKS = (
    Task("countdown", NUMBERS, countdown, "Jiayi-Pan/Countdown-Tasks-3to4", "train", about="three or four numbers make a target"),
    Task("game24", NUMBERS, game24, "test-time-compute/game-of-24", "train", about="four numbers make 24 (arXiv 2305.10601)"),
    Task("mr_gsm8k", VERDICT, mr_gsm8k, "Randolphzeng/Mr-GSM8K", about="find the first error of a solution (arXiv 2312.17080)"),
    *(
        Task(f"sort{length}{suffix}", SORTED, generate=partial(sorting, length, lowest), about=f"sort {length} numbers{more}")
        for length in (8, 16, 32)
        for suffix, lowest, more in (("", 0, ""), ("_mixed", -100, ", some negative"))
    ),
)
