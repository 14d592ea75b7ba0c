"""A reward for thinking in one language. Languages are told apart by their letters, which needs no model."""

import functools
import re
import unicodedata
from typing import Literal

from jaxreason.rewards.sample import Sample
from jaxreason.text import THINK_CLOSE, THINK_OPEN

Language = Literal["en", "zh", "ja", "ko", "ru", "ar", "he", "hi", "el", "th"]
_SCRIPTS: dict[str, frozenset[str]] = {
    "en": frozenset({"LATIN"}),
    "zh": frozenset({"CJK"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "ko": frozenset({"HANGUL"}),
    "ru": frozenset({"CYRILLIC"}),
    "ar": frozenset({"ARABIC"}),
    "he": frozenset({"HEBREW"}),
    "hi": frozenset({"DEVANAGARI"}),
    "el": frozenset({"GREEK"}),
    "th": frozenset({"THAI"}),
}
_WITHOUT_SPACES = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI"})  # every letter counts as a word
_VARIABLES = frozenset({"LATIN", "GREEK"})  # a single letter of these is the name of a quantity
_CLOSES = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]", "```": "```"}
_MARK = re.compile(r"\$\$?|\\[()\[\]]|```")
_COMMAND = re.compile(r"\\[A-Za-z]+")


def language(sample: Sample, *, language: Language = "en") -> float:
    """The share of words of the thought that are in ``language``: DeepSeek-R1's language consistency (2501.12948).

    The thought is what stands between ``<think>`` and ``</think>``; without these it is the whole turn. Words are runs of
    letters of one script, in scripts without spaces its single letters. Formulas, code in fences, LaTeX commands and single
    Latin or Greek letters are no words. 0 where there is no word. Letters alone decide: ``en`` stands for every language in
    Latin letters, and Japanese in kanji alone is Chinese. Linear in the length of the text.
    """
    counts = _words(unicodedata.normalize("NFKC", _prose(_thought(sample.transcript))))
    total = sum(counts.values())
    return sum(counts.get(script, 0) for script in _SCRIPTS[language]) / total if total else 0.0


def _thought(text: str) -> str:
    before, opened, after = text.partition(THINK_OPEN)
    return (after if opened else before).partition(THINK_CLOSE)[0]


def _prose(text: str) -> str:
    """Without formulas and fenced code; one that is not closed is text."""
    kept, start, opened = [], 0, None
    for mark in _MARK.finditer(text):
        if opened is None and mark.group() in _CLOSES:
            opened = mark
        elif opened is not None and mark.group() == _CLOSES[opened.group()]:
            kept.append(text[start : opened.start()])
            start, opened = mark.end(), None
    return _COMMAND.sub(" ", " ".join([*kept, text[start:]]))


def _words(text: str) -> dict[str, int]:
    """How many words of each script."""
    counts: dict[str, int] = {}
    run, length = "", 0
    for letter in [*text, " "]:
        script = _script(letter)
        if script == "":  # a combining mark belongs to the letter before it
            continue
        if script == run and script not in _WITHOUT_SPACES:
            length += 1
            continue
        if run and not (run in _VARIABLES and length == 1):
            counts[run] = counts.get(run, 0) + 1
        run, length = (script or ""), 1
    return counts


@functools.cache
def _script(letter: str) -> str | None:
    """The first word of a letter's Unicode name, such as LATIN; "" for a mark on a letter; None for anything else."""
    if unicodedata.category(letter).startswith("M"):
        return ""
    return unicodedata.name(letter, "UNKNOWN").replace("-", " ").split()[0] if letter.isalpha() else None
