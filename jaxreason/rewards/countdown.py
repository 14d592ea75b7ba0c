"""Countdown: any expression that uses the given numbers once each and makes the target is an answer."""

import ast
import json
import math
import operator
import re
from fractions import Fraction

from jaxreason.rewards.answer import AnswerIn, extract
from jaxreason.rewards.sample import Sample

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_MAX_CHARS = 300  # far beyond any real answer: nested text would otherwise reach the parser's recursion limit
_LATEX = (
    (re.compile(r"\\[()\[\]]|\\(?:left|right)(?![A-Za-z])"), ""),  # around a formula, and before its parentheses
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"((\1)/(\2))"),
)
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "[": "(", "]": ")"})


def countdown(sample: Sample, *, answer_in: AnswerIn = "auto", use: str = "all") -> float | None:
    """1 where the final answer is an equation or expression that makes the target, 0 otherwise; exact arithmetic.

    Args:
      answer_in: where the answer is, as in ``accuracy``.
      use: ``all`` numbers exactly once (TinyZero), or ``some`` of them, each at most once (the game's own rule).
    The gold is ``{"nums": [...], "target": n}``, as the row format ``countdown`` writes it; None where it is not.
    """
    puzzle = _puzzle(sample.gold)
    if puzzle is None:
        return None
    if use not in ("all", "some"):
        raise ValueError(f"use is {use!r}; it is all or some")
    answers = extract(sample, answer_in=answer_in)
    if not answers:
        return 0.0
    found = evaluate(answers[-1])
    if found is None:
        return 0.0
    value, used = found
    given, target = puzzle
    pool = list(given)
    for number in used:
        if number not in pool:
            return 0.0
        pool.remove(number)
    return float(value == target and not (pool and use == "all"))


def _puzzle(gold: str | None) -> tuple[list[Fraction], Fraction] | None:
    try:
        read = json.loads(gold or "")
        return [Fraction(str(number)) for number in read["nums"]], Fraction(str(read["target"]))
    except (ValueError, KeyError, TypeError):
        return None


def evaluate(text: str) -> tuple[Fraction, list[Fraction]] | None:
    """Value and numbers of an expression of + - * / and parentheses; of ``left = right`` the left one. None if it is
    anything else, or divides by zero."""
    text = text.partition("=")[0]
    if len(text) > _MAX_CHARS:
        return None
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = text.translate(_SIGNS).strip(" $.`\n")
    if not text or not text.isascii():
        return None
    try:
        used: list[Fraction] = []
        return _value(ast.parse(text, mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, used: list[Fraction]) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and math.isfinite(node.value):
        if isinstance(node.value, bool):
            raise ValueError("not arithmetic")
        used.append(Fraction(str(node.value)))
        return used[-1]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("not arithmetic")
