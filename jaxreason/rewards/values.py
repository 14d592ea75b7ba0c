"""Whether two written answers mean the same: exact where both are numbers or words, math-verify for the rest."""

import dataclasses
import functools
import importlib.util
import logging
import re
from fractions import Fraction
from typing import Any, Literal

from jaxreason.errors import UserError
from jaxreason.rewards import closeness, exact, units
from jaxreason.text import MAX_ANSWER_CHARS, without_emphasis

Kind = Literal["number", "notation", "words", "expression"]


@dataclasses.dataclass(frozen=True)
class Value:
    """An answer as read: ``text`` is its normal form, ``number`` its exact value where it is a plain number.

    A ``notation`` is a numeral of another base, a clock time or a ratio, in the normal form of ``exact.notation``.
    """

    raw: str
    text: str
    kind: Kind
    number: Fraction | None = None
    unit: str = ""  # canonical, "%" for percent; the number is not scaled by it


# Digits are spelled [0-9]: \d, int() and Fraction() would take any script's digits.
_INT = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INT}(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?:[A-Za-z]\s*=\s*)?(?P<sign>[+-]?)\s*[€£¥]?\s*
    (?: (?:(?P<whole>{_INT})\s*)?
        \\frac\s*(?:\{{\s*(?P<top>[+-]?{_DECIMAL})\s*\}}|(?P<top_digit>[0-9]))
              \s*(?:\{{\s*(?P<bottom>{_DECIMAL})\s*\}}|(?P<bottom_digit>[0-9]))
      | (?:(?P<mixed>{_INT})\s+)?(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})
      | (?P<decimal>{_DECIMAL})
        (?:[eE](?P<e>[+-]?[0-9]{{1,3}})
          | \s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*(?:\{{\s*(?P<ten>[+-]?[0-9]{{1,3}})\s*\}}|(?P<ten_digit>[0-9])))?
    )\s*(?P<tail>.*)""",
    re.VERBOSE | re.DOTALL,
)

_SPOKEN = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("\u2212", "-"),  # the minus sign; other look-alikes and other scripts' digits are not normalised
        (r"(?<!\\)\\[()\[\]]|\\?\$", ""),  # mathematics delimiters and the dollar sign
        (r"\\[!,;:>]|\\q?quad(?![A-Za-z])|\\(?:left|right)(?![A-Za-z])", ""),
        (r"(?<!\\)\\ |~", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\%", "%"),
        (r"\{,\}", ","),
        (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|°", " degrees"),
        (_SPOKEN, r" \1 "),
        (r"\s+", " "),
    )
]
_FUNCTIONS = re.compile("(arc)?(sin|cos|tan|cot|sec|csc)h?|log|exp|sqrt|max|min|gcd|lcm|mod")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTERS = re.compile(r"[A-Za-z]+")
_WORDS = re.compile(r"[A-Za-z](?:[A-Za-z' -]*[A-Za-z])?")


def read(raw: str) -> Value | None:
    """The value of a written answer, without its box; None for nothing, for over ``MAX_ANSWER_CHARS``, for foreign digits.

    Numbers are integers, decimals, thousands commas, fractions, mixed numbers and scientific notation with exponents
    of at most three digits, with an optional currency sign before and a percent sign or a unit after (``units.read``).
    Digits are ASCII: a text with any other script's digits is not an answer. Words are letters only and ignore case.
    Markdown's emphasis around an answer is left out.
    """
    if len(raw) > MAX_ANSWER_CHARS or any(c.isdigit() and not c.isascii() and c not in "²³" for c in raw):
        return None
    text = _normalise(raw)
    if not text:
        return None
    if (form := exact.notation(text)) is not None:
        return Value(raw, form, "notation")
    spoken = frozenset(_LETTERS.findall(" ".join(_SPOKEN.findall(raw)).lower()))
    if (found := _read_number(text, spoken)) is not None:
        return Value(raw, text, "number", *found)
    if _WORDS.fullmatch(text):
        return Value(raw, text.casefold(), "words")
    return Value(raw, re.sub(r"\s", "", text), "expression")


def same(gold: Value, answer: Value, symbolic: Literal["auto", "never"]) -> bool | None:
    """Whether ``answer`` means ``gold``; None where the gold is no mathematics that can be read.

    Two numbers are compared exactly, so 0.333 is not 1/3. Units must agree where both have one; a percent sign that
    only one side has may be missing or may mean hundredths. Numerals of another base, clocks and ratios are compared as such
    (``exact.same_notation``). Otherwise equal normal forms are the same, and prose is never more than its letters.
    ``symbolic="never"`` leaves the rest unequal. Else arithmetic is worked out exactly, and what is left goes to math-verify,
    gold first, whose numbers must also agree in 30 digits: its own comparison rounds.
    Raises UserError where math-verify is needed to read the gold and is not installed.
    """
    if "notation" in (gold.kind, answer.kind):
        return _same_notation(gold, answer)
    if gold.number is not None and answer.number is not None:
        return _same_number(gold.number, gold.unit, answer.number, answer.unit)
    # math-verify drops every unit, so a gold with one is left to the exact comparison.
    mathematical = symbolic == "auto" and not gold.unit and not _is_prose(gold)
    values = [_worked_out(value) for value in (gold, answer)] if mathematical and not _is_prose(answer) else [None, None]
    if mathematical and gold.kind == "expression" and values[0] is None and not _parse(_formula(gold)):
        return None
    if gold.text == answer.text:
        return True
    if None not in values:
        return "too large" not in values and values[0] == values[1]
    if not mathematical or _is_prose(answer) or not is_math_verify_installed():
        return False
    return _verify(_formula(gold), _formula(answer))


def _same_notation(gold: Value, answer: Value) -> bool:
    if gold.kind == answer.kind:
        return exact.same_notation(gold.text, answer.text)
    form, number = (gold.text, answer.number) if gold.kind == "notation" else (answer.text, gold.number)
    return number is not None and exact.ratio(form) == number


def _worked_out(value: Value) -> Fraction | Literal["too large"] | None:
    """The exact value of a number or of arithmetic with rational value, without a unit; None of anything else."""
    if value.number is not None:
        return None if value.unit else value.number
    try:
        return exact.rational(_normalise(value.raw)) if value.kind == "expression" else None
    except exact.TooLarge:
        return "too large"


@functools.cache
def is_math_verify_installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def _normalise(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;: ")
    if len(text) <= MAX_ANSWER_CHARS:
        text = without_emphasis(text)
    inner = text[1:-1]
    wrapped = text[:1] + text[-1:] in ("()", "{}") and not re.search(r"[(){},]", inner)
    return inner.strip() if wrapped else text


def _read_number(text: str, spoken: frozenset[str]) -> tuple[Fraction, str] | None:
    match = _NUMBER.fullmatch(text)
    unit = units.read(match["tail"].strip(), spoken) if match else None
    if match is None or unit is None:
        return None
    whole = _exact(match["whole"] or match["mixed"] or "0")
    top = _exact(match["top"] or match["top_digit"] or match["over"] or match["decimal"])
    bottom = _exact(match["bottom"] or match["bottom_digit"] or match["under"] or "1")
    if bottom == 0 or (whole and top < 0):
        return None
    exponent = int(match["e"] or match["ten"] or match["ten_digit"] or 0)
    value = (whole + top / bottom) * Fraction(10) ** exponent
    return (-value if match["sign"] == "-" else value), unit


def _exact(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _same_number(gold: Fraction, gold_unit: str, answer: Fraction, answer_unit: str) -> bool:
    if (gold_unit == "%") != (answer_unit == "%"):
        percent, plain = (gold, answer) if gold_unit == "%" else (answer, gold)
        return not (gold_unit and answer_unit) and plain in (percent, percent / 100)
    return gold == answer and units.agree(gold_unit, answer_unit)


def _is_prose(value: Value) -> bool:
    """Words in it: to sympy they are products of letters, in which "dog" is "god", and "1 or 2" is a set."""
    if value.kind == "number":
        return False
    words = _LETTERS.findall(_LATEX_COMMAND.sub(" ", _normalise(value.raw)))
    lowered = [word.lower() for word in words]
    return any(word in ("or", "and") or (len(word) > 2 and not _FUNCTIONS.fullmatch(word)) for word in lowered)


@functools.cache
def load_math_verify() -> Any:
    """The module. Raises UserError where it is not installed."""
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise UserError(
            "reward accuracy: this gold answer needs math-verify to be read: pip install 'jaxreason[math]', "
            "or give the option symbolic: never for plain comparison"
        ) from error
    # It warns that its own time limit is off: that one is SIGALRM, no use off the main thread. The pool kills instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def _formula(value: Value) -> str:
    """LaTeX for math-verify: a number's exact value, or what was written, without the mark that ends its sentence."""
    if value.number is not None:
        return f"\\frac{{{value.number.numerator}}}{{{value.number.denominator}}}"
    bare = re.sub(r"(?<!\\)\\[()\[\]]|\\?\$", "", value.raw)
    return re.sub(r"(?<!\\)[.,;:\s]+$", "", bare).strip()


@functools.lru_cache(maxsize=1024)
def _parse(formula: str) -> tuple:
    """math-verify's reading of a formula, empty where it cannot be read."""
    library = load_math_verify()
    config = [library.LatexExtractionConfig()]
    return tuple(library.parse(f"${formula}$", config, fallback_mode="no_fallback", parsing_timeout=None))


def _verify(gold: str, answer: str) -> bool:
    """Raises what sympy raises: a comparison that breaks is an error, not a wrong answer."""
    golds, answers = _parse(gold), _parse(answer)
    verify = functools.partial(load_math_verify().verify, timeout_seconds=None, raise_on_error=True)
    return bool(golds and answers and verify(list(golds), list(answers))) and closeness.any_close(golds, answers)
