"""Finding the answer of a completion, and the accuracy reward."""

import re
from typing import Literal

from jaxreason.rewards import values
from jaxreason.rewards.sample import Sample, final_span
from jaxreason.text import ANSWER_CLOSE, ANSWER_OPEN, MAX_ANSWER_CHARS, boxed, has_box, last_boxed, unwrap, without_emphasis

AnswerIn = Literal["auto", "boxed", "tag", "text"]
_LEAD_IN = re.compile(
    r"(?:(?:#{1,6}\s+)?(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer(?:\s*(?:is|:|=)\s*:?|\s*\n)|####)\s*",
    re.IGNORECASE,
)


def extract(sample: Sample, *, answer_in: AnswerIn = "auto") -> list[str]:
    r"""Every answer given in the final span, in order, without its box or tags; empty when there is none.

    ``boxed`` takes ``\boxed{}``; ``tag`` takes ``<answer></answer>``; ``text`` takes the whole span, which may begin
    with "The answer is", "**Answer:**" or "####" and is never searched for numbers. ``auto`` takes boxes if there is one,
    else tags if there is one, else the text. An unterminated box, or an unpaired tag, is no answer.
    """
    span = final_span(sample)
    if span is None:
        return []
    if answer_in == "boxed" or (answer_in == "auto" and has_box(span)):
        return [unwrap(content) for content in boxed(span) or []]
    if answer_in == "tag" or (answer_in == "auto" and (ANSWER_OPEN in span or ANSWER_CLOSE in span)):
        return _tagged(span)
    text = span.strip()
    text = without_emphasis(text) if len(text) <= MAX_ANSWER_CHARS else text
    return [text[match.end() :] if (match := _LEAD_IN.match(text)) else text] if text else []


def accuracy(
    sample: Sample,
    *,
    answer_in: AnswerIn = "auto",
    multiple_boxed: Literal["wrong", "last"] = "wrong",
    symbolic: Literal["auto", "never"] = "auto",
) -> float | None:
    r"""1 where the final answer means the gold, 0 where it does not or is missing, None where the gold is unreadable.

    Args:
      answer_in: where the answer is, see ``extract``. Reasoning is never searched.
      multiple_boxed: several different answers in the final span: all of it ``wrong``, or the ``last`` one counts.
      symbolic: ``auto`` compares formulas with math-verify; ``never`` knows plain numbers, units and words only.
    Raises UserError for a formula as gold without math-verify installed. Comparison: ``values.same``.
    """
    gold = values.read(_gold_text(sample.gold or ""))
    if gold is None:
        return None
    # The gold is compared with itself first: what is unreadable must be so for every completion of its group.
    if values.same(gold, gold, symbolic) is None:
        return None
    answers = [values.read(text) for text in extract(sample, answer_in=answer_in)]
    if not answers or answers[-1] is None:
        return 0.0
    if multiple_boxed == "wrong" and not all(_alike(answer, answers[-1]) for answer in answers[:-1]):
        return 0.0
    return float(bool(values.same(gold, answers[-1], symbolic)))


def prepare(symbolic: str = "auto", **_: object) -> None:
    """Imports what a worker will need, so that no sample's time limit pays for it."""
    if symbolic == "auto" and values.is_math_verify_installed():
        values.load_math_verify()


def _alike(one: values.Value | None, other: values.Value) -> bool:
    return one is not None and bool(values.same(other, one, "never"))


def _tagged(span: str) -> list[str]:
    opened, *rest = span.split(ANSWER_OPEN)
    parts = [part.split(ANSWER_CLOSE) for part in rest]
    if ANSWER_CLOSE in opened or any(len(part) != 2 for part in parts):
        return []
    return [content.strip() for content, _ in parts]


def _gold_text(gold: str) -> str:
    """The answer in a gold that may be a whole solution, as in MATH (last box) or GSM8K (after ``####``)."""
    return (last_boxed(gold) or "") if has_box(gold) else gold.rpartition("####")[2].strip()
