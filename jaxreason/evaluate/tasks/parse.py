r"""Answers read from the final span of a completion, the text after the thought, which is never searched itself.

Every parser takes the span and the problem, and returns the answer as a grader compares it, or None where none was given
or where several were. An answer is looked for in a box, then in ``<answer>`` tags, then after the last "answer is" or
"####"; a span that is nothing but an answer is one. The last number or letter of a text is never taken for its answer.
"""

import json
import re
from collections.abc import Sequence

from jaxreason.evaluate.tasks.task import Problem
from jaxreason.rewards import values
from jaxreason.text import ANSWER_CLOSE, ANSWER_OPEN, MAX_ANSWER_CHARS, boxed, has_box, unwrap

_LEAD_IN = re.compile(r"\banswer\s*(?:\*\*|__)?\s*(?:is|:|=)\s*:?\s*(?:\*\*|__)?\s*|####\s*", re.IGNORECASE)
_TAGGED = re.compile(re.escape(ANSWER_OPEN) + "(.*?)" + re.escape(ANSWER_CLOSE), re.DOTALL)
_NUMBER = re.compile(
    r"(?:\\?[$€£¥]\s*)?([+-]?)\s*(?:\\?[$€£¥]\s*)?"
    r"([0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]+(?:\.[0-9]+)?(?:\s*/\s*[0-9]+)?|\.[0-9]+)"
)
_MINUS = str.maketrans({"−": "-", "–": "-"})
_ANOTHER = re.compile(r"\s*(?:\S+\s+)?(?:or|and|to|/|,|;|-|±)\s*\\?[$]?-?[0-9]")
_LETTER = re.compile(
    r"(?:option|choice|letter)?\s*[\[(*\"'$]*\s*(?:\\text\w*\{)?\s*\(?([A-Z])\b[\])}*\"'$]*(?:\\\))?", re.IGNORECASE
)
_ARTICLE = re.compile(r"\s+(?!because\b|since\b|as\b|which\b|for\b)[a-z]")
_ALSO = re.compile(r"\s*(?:or|and|/|,|&|nor)\s*[\[(*]*[A-Z]\b[\])*.]*(?![a-z' ]+[a-z])")
_INTEGER = re.compile(r"-?[0-9]+")


def stated(span: str, *, lines: bool = False) -> list[str]:
    """The texts in which answers are given: all boxes, else all tags, else what follows the last "answer is", to the end of
    its sentence (``lines``: of its line), else the span itself; [] where a box or a tag is left open."""
    if has_box(span):
        return [unwrap(content) for content in boxed(span) or []]
    if ANSWER_OPEN in span or ANSWER_CLOSE in span:
        found = _TAGGED.findall(span)
        return [content.strip() for content in found] if span.count(ANSWER_OPEN) == span.count(ANSWER_CLOSE) == len(found) else []
    if leads := list(_LEAD_IN.finditer(span)):
        rest = span[leads[-1].end() :].lstrip()
        end = re.search(r"\n" if lines else r"\n|[.!?](?=\s|$)", rest)
        return [rest[: end.start()] if end else rest]
    return [span.strip()]


def _one(found: Sequence[str | None]) -> str | None:
    """The answer that all agree on."""
    return found[0] if found and all(answer == found[0] for answer in found) else None


def number(span: str, problem: Problem) -> str | None:
    """A number with or without commas, currency, percent and a unit of any name; ``a = b`` is b. "3 or 4" is none."""
    return _one([_number(text[:MAX_ANSWER_CHARS]) for text in stated(span)])


def _number(text: str) -> str | None:
    text = text.translate(_MINUS).strip().strip("*_`")
    if "=" in text:
        text = text.rpartition("=")[2]
    value = values.read(text)
    if value is not None and value.number is not None:
        return str(value.number)
    text = re.sub(r"^[\s*_`\"'(\\]*(?:(?:approximately|about|exactly|a total of|only)\s+)?", "", text)
    match = _NUMBER.match(text)
    if match is None or _ANOTHER.match(text, match.end()) or re.match(r"[0-9]|[.:][0-9]|\^|\s*[*+×/]", text[match.end() :]):
        return None
    value = values.read(re.sub(r"[\s{}]", "", match[1] + match[2]))
    return None if value is None or value.number is None else str(value.number)


def expression(span: str, problem: Problem) -> str | None:
    """A formula, as it is written, or a number: math-verify compares it."""
    found = [text.strip() for text in stated(span)]
    found = [text[: -len("$")].lstrip("$") if text.startswith("$") and text.endswith("$") else text for text in found]
    return (_one([same_form(text) for text in found]) or None) if all(len(text) <= MAX_ANSWER_CHARS for text in found) else None


def same_form(text: str) -> str:
    r"""A plain number in one form, so that votes for ``\frac12`` and for 0.5 are for one answer; other texts as they are."""
    value = values.read(text)
    return text if value is None or value.number is None or value.unit else str(value.number)


def letter(span: str, problem: Problem) -> str | None:
    """The letter of a choice, or a choice's own text. "A or B" is none; "(A) is wrong, the answer is B" is B."""
    return _one([_letter(text, problem.choices) for text in stated(span)])


def _letter(text: str, choices: Sequence[str]) -> str | None:
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    plain = text.strip().strip(".").strip().casefold()
    for name, choice in zip(letters, choices):
        if plain.upper() not in letters and plain == choice.strip().strip(".").casefold():
            return name
    match = _LETTER.match(text.lstrip())
    if match is None:
        return None
    name, rest = match[1], text.lstrip()[match.end() :]
    if name.islower() and rest.strip(" .)"):  # "a dog": a word, not a choice
        return None
    if name.upper() not in letters or _ALSO.match(rest):
        return None
    if name in "AI" and _ARTICLE.match(rest) and not match[0].strip().endswith((")", "]", "*")):
        return None
    return name.upper()


def equation(span: str, problem: Problem) -> str | None:
    """An expression of numbers and + - * / ( ), with or without ``= value``: the grader computes it."""
    found = [re.sub(r"[.\s]+$", "", text.strip().strip("`*$")) for text in stated(span, lines=True)]
    return (_one(found) or None) if all(len(text) <= MAX_ANSWER_CHARS for text in found) else None


def integers(span: str, problem: Problem) -> str | None:
    """A list of whole numbers as JSON, between brackets or alone on its line."""
    found = []
    for text in stated(span, lines=True):
        lists = re.findall(r"\[([^\[\]]*)\]", text)
        inner = lists[-1] if lists else text
        inner = inner.translate(_MINUS).strip(" .")
        words = [word for word in re.split(r"[\s,]+", inner) if word]
        whole = bool(words) and all(_INTEGER.fullmatch(word) for word in words)
        found.append(json.dumps([int(word) for word in words]) if whole and len(set(lists)) < 2 else None)
    return _one(found)


def first_error(span: str, problem: Problem) -> str | None:
    """``correct`` or ``step N``: a verdict on a solution."""
    text = stated(span)[-1].strip().strip("*.").lower() if stated(span) else ""
    if re.fullmatch(r"(?:the solution is )?correct", text):
        return "correct"
    match = re.fullmatch(r"(?:wrong|incorrect)?\W*(?:the )?(?:first error (?:is )?(?:in |at )?)?step:? ?([0-9]{1,3})", text)
    return f"step {int(match[1])}" if match else None
