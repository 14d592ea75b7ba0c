"""Whether two written answers mean the same: exact where both are numbers or words, math-verify for the rest."""

import dataclasses
import functools
import importlib.util
import logging
import re
from fractions import Fraction
from typing import Any, Literal

from jaxreason.errors import UserError
from jaxreason.text import MAX_ANSWER_CHARS

Kind = Literal["number", "words", "expression"]


@dataclasses.dataclass(frozen=True)
class Value:
    """An answer as read: ``text`` is its normal form, ``number`` its exact value where it is a plain number."""

    raw: str
    text: str
    kind: Kind
    number: Fraction | None = None
    unit: str = ""  # canonical, "%" for percent; the number is not scaled by it


_UNITS = {
    alias: aliases.split()[0]
    for aliases in (
        "cm centimeter centimeters centimetre centimetres", "mm millimeter millimeters millimetre millimetres",
        "km kilometer kilometers kilometre kilometres", "meter meters metre metres", "inch inches in", "foot feet ft",
        "yard yards yd", "mile miles mi", "unit units", "kg kilogram kilograms", "gram grams",
        "mg milligram milligrams", "pound pounds lb lbs", "ounce ounces oz", "ton tons",
        "second seconds sec", "minute minutes min",
        "hour hours hr hrs", "day days", "week weeks", "month months", "year years", "liter liters litre litres",
        "ml milliliter milliliters", "gallon gallons", "degree degrees", "radian radians", "dollar dollars usd",
        "cent cents", "euro euros", "mph", "people person persons", "% percent",
    )
    for alias in aliases.split()
}  # fmt: skip
_UNIT = re.compile(
    r"(?:(?P<power>square|sq|cubic)\s+)?(?P<word>[a-z]+|%)\s*(?:\^\s*\{?\s*(?P<exponent>[23])\s*\}?|(?P<raised>[²³]))?"
    r"(?:\s*(?:/|per)\s*(?P<per>[a-z]+))?"
)
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "²": "2", "³": "3"}

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
        (r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
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
    of at most three digits, with an optional currency sign before and a percent sign or a known unit after. Digits
    are ASCII: a text with any other script's digits is not an answer. Words are letters only and ignore case.
    """
    if len(raw) > MAX_ANSWER_CHARS or any(c.isdigit() and not c.isascii() and c not in "²³" for c in raw):
        return None
    text = _normalise(raw)
    if not text:
        return None
    if (found := _read_number(text)) is not None:
        return Value(raw, text, "number", *found)
    if _WORDS.fullmatch(text):
        return Value(raw, text.casefold(), "words")
    return Value(raw, re.sub(r"\s", "", text), "expression")


def same(gold: Value, answer: Value, symbolic: Literal["auto", "never"]) -> bool | None:
    """Whether ``answer`` means ``gold``; None where the gold is no mathematics that can be read.

    Two numbers are compared exactly, so 0.333 is not 1/3. Units must agree where both have one; a percent sign that
    only one side has may be missing or may mean hundredths. Otherwise equal normal forms are the same, prose is never
    more than its letters, and what is left goes to math-verify, gold first. ``symbolic="never"`` leaves it unequal.
    Raises UserError where math-verify is needed to read the gold and is not installed.
    """
    # math-verify drops every unit, so a gold with one is left to the exact comparison.
    mathematical = symbolic == "auto" and not gold.unit and not _is_prose(gold)
    if mathematical and gold.kind == "expression" and not _parse(_formula(gold)):
        return None
    if gold.number is not None and answer.number is not None:
        return _same_number(gold.number, gold.unit, answer.number, answer.unit)
    if gold.text == answer.text:
        return True
    if not mathematical or _is_prose(answer) or not is_math_verify_installed():
        return False
    return _verify(_formula(gold), _formula(answer))


@functools.cache
def is_math_verify_installed() -> bool:
    return importlib.util.find_spec("math_verify") is not None


def _normalise(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".,;: ")
    inner = text[1:-1]
    wrapped = text[:1] + text[-1:] in ("()", "{}") and not re.search(r"[(){},]", inner)
    return inner.strip() if wrapped else text


def _read_number(text: str) -> tuple[Fraction, str] | None:
    match = _NUMBER.fullmatch(text)
    unit = _read_unit(match["tail"].strip()) if match else None
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


def _read_unit(tail: str) -> str | None:
    """The canonical unit; None where ``tail`` is something else, such as a variable, ``million`` or ``or 3``."""
    if not tail:
        return ""
    match = _UNIT.fullmatch(tail.lower())
    if match is None or match["word"] not in _UNITS or (match["per"] and match["per"] not in _UNITS):
        return None
    power = match["exponent"] or _POWERS.get(match["power"] or match["raised"], "")
    return _UNITS[match["word"]] + power + ("/" + _UNITS[match["per"]] if match["per"] else "")


def _same_number(gold: Fraction, gold_unit: str, answer: Fraction, answer_unit: str) -> bool:
    if (gold_unit == "%") != (answer_unit == "%"):
        percent, plain = (gold, answer) if gold_unit == "%" else (answer, gold)
        return not (gold_unit and answer_unit) and plain in (percent, percent / 100)
    return gold == answer and (gold_unit == answer_unit or not gold_unit or not answer_unit)


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
    """LaTeX for math-verify: a number's exact value, or what was written."""
    if value.number is not None:
        return f"\\frac{{{value.number.numerator}}}{{{value.number.denominator}}}"
    return re.sub(r"(?<!\\)\\[()\[\]]|\\?\$", "", value.raw).strip()


@functools.lru_cache(maxsize=1024)
def _parse(formula: str) -> tuple:
    """math-verify's reading of a formula, empty where it cannot be read."""
    library = load_math_verify()
    config = [library.LatexExtractionConfig()]
    return tuple(library.parse(f"${formula}$", config, fallback_mode="no_fallback", parsing_timeout=None))


def _verify(gold: str, answer: str) -> bool:
    """Raises what sympy raises: a comparison that breaks is an error, not a wrong answer."""
    parsed = _parse(gold), _parse(answer)
    return all(parsed) and load_math_verify().verify(
        list(parsed[0]), list(parsed[1]), timeout_seconds=None, raise_on_error=True
    )
