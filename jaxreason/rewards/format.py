"""Rewards for the structure of the assistant's turn. All are linear in the length of the text."""

import re
from typing import Literal

from jaxreason.rewards.sample import Sample
from jaxreason.text import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

Template = Literal["think", "r1"]
_TAGS: dict[str, tuple[str, ...]] = {
    "think": (THINK_OPEN, THINK_CLOSE),
    "r1": (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE),
}
_TAG = re.compile("|".join(map(re.escape, _TAGS["r1"])))


def format(sample: Sample, *, template: Template = "think") -> float:
    """1 for a finished turn of exactly the wanted structure, else 0.

    ``think``: ``<think>reasoning</think>answer``, without any ``<answer>`` tag; ``r1`` (DeepSeek-R1, 2501.12948):
    ``<think>reasoning</think> <answer>answer</answer>``, with only white space outside of the tags. Every tag occurs
    once and in this order, the turn begins with the first one, reasoning and answer are not blank. A truncated
    completion has no finished structure. A ``<think>`` that ends the prompt counts as the turn's.
    """
    text = sample.transcript.strip()
    if sample.truncated or tuple(_TAG.findall(text)) != _TAGS[template]:
        return 0.0
    before, *parts = _TAG.split(text)
    if template == "think":
        reasoning, answer = parts
        outside = before
    else:
        reasoning, between, answer, after = parts
        outside = before + between + after
    return float(not outside.strip() and bool(reasoning.strip()) and bool(answer.strip()))


def tag_count(sample: Sample, *, template: Template = "think") -> float:
    """The share of the template's tags that occur exactly once in the turn, in any order: a softer ``format``.

    ``think`` has two tags (1/2 each), ``r1`` four (1/4 each, as in open-r1). A ``<think>`` that ends the prompt counts.
    """
    found = _TAG.findall(sample.transcript)
    tags = _TAGS[template]
    return sum(found.count(tag) == 1 for tag in tags) / len(tags)
