"""Exact values of written arithmetic, and of notations that only look like it: numerals of another base, clocks, ratios."""

import functools
import math
import re
from fractions import Fraction

MAX_BITS = 20_000  # of a numerator or denominator
_MAX_ARGUMENT = 1_000  # of a factorial or binomial
_MAX_DEPTH = 50

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]*)"
    r"(?:\\overline\s*\{\s*(?P<repeats>[0-9]{1,50})\s*\})?"
    r"|(?P<command>\\(?:frac|d?binom|sqrt|times|cdot|div)(?![A-Za-z]))|(?P<sign>\*\*|[-+*/^!(){}\[\]×·÷]))"
)
_SIGNS = {"\\times": "*", "\\cdot": "*", "×": "*", "·": "*", "\\div": "/", "÷": "/", "**": "^"}
_NUMERAL = re.compile(r"([0-9A-Z]{1,60})\s*_\s*(?:\{\s*([0-9]{1,2})\s*\}|([0-9]))", re.IGNORECASE)
_CLOCK = re.compile(r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?\s*(?:([ap])\.?\s?m)?", re.IGNORECASE)
_RATIO = re.compile(r"[0-9]{1,50}(?:\s*:\s*[0-9]{1,50})+")


class TooLarge(ValueError):
    """Arithmetic that would take more than ``MAX_BITS`` bits: it is a number, which nobody works out."""


class _NotArithmetic(ValueError):
    pass


@functools.lru_cache(maxsize=1024)
def rational(text: str) -> Fraction | None:
    r"""The value of an expression of + - * / ^ ! ``\frac`` ``\binom``, and roots that come out even; None for any other text.

    Numbers are integers, decimals and ``0.\overline{3}``. A power binds tighter than a sign before it, powers group from the
    right, and ``2(3)`` is a product. Raises TooLarge.
    """
    try:
        parser = _Parser(text)
        value = parser.sum(0)
        return value if parser.ended else None
    except (_NotArithmetic, ZeroDivisionError):
        return None


class _Parser:
    """Recursive descent. Every method reads from ``at`` on and returns the value of what it read."""

    def __init__(self, text: str):
        self.tokens: list[str | Fraction] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            match = _TOKEN.match(text, at)
            if match is None or match.end() == at:
                raise _NotArithmetic
            self.tokens.append(_number(match) if match["number"] else _SIGNS.get(word := match[0].strip(), word))
            at = match.end()
        self.at = 0

    @property
    def ended(self) -> bool:
        return self.at == len(self.tokens)

    @property
    def next(self) -> str | Fraction | None:
        return None if self.ended else self.tokens[self.at]

    def take(self, *wanted: str) -> str | None:
        token = self.next
        if not isinstance(token, str) or token not in wanted:
            return None
        self.at += 1
        return token

    def need(self, wanted: str) -> None:
        if self.take(wanted) is None:
            raise _NotArithmetic

    def sum(self, depth: int) -> Fraction:
        if depth > _MAX_DEPTH:
            raise _NotArithmetic
        value = self.product(depth)
        while sign := self.take("+", "-"):
            other = self.product(depth)
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def product(self, depth: int) -> Fraction:
        value, divided = self.signed(depth), False
        while True:
            if sign := self.take("*", "/"):
                other = self.signed(depth)
                value, divided = _bounded(value * other if sign == "*" else value / other), divided or sign == "/"
            elif self.next == "(" and not divided:  # a / b(c) means either of two things
                value = _bounded(value * self.power(depth))
            else:
                return value

    def signed(self, depth: int) -> Fraction:
        sign = 1
        while found := self.take("+", "-"):
            sign = -sign if found == "-" else sign
        return sign * self.power(depth)

    def power(self, depth: int) -> Fraction:
        base = self.factorial(depth)
        if not self.take("^"):
            return base
        if depth > _MAX_DEPTH:
            raise _NotArithmetic
        sign = -1 if self.take("-") else 1
        return _power(base, sign * self.power(depth + 1))

    def factorial(self, depth: int) -> Fraction:
        value = self.primary(depth)
        if self.take("!"):
            if self.next == "!":
                raise _NotArithmetic  # 5!! is no factorial of a factorial
            value = Fraction(math.factorial(_argument(value)))
        return value

    def primary(self, depth: int) -> Fraction:
        token = self.next
        if isinstance(token, Fraction):
            self.at += 1
            return token
        if self.take("("):
            return self.closed(")", depth)
        if self.take("{"):
            return self.closed("}", depth)
        if self.take("\\frac"):
            top = self.argument(depth)
            return _bounded(top / self.argument(depth))
        if self.take("\\binom", "\\dbinom"):
            n = self.argument(depth)
            return Fraction(math.comb(_argument(n), _argument(self.argument(depth))))
        if self.take("\\sqrt"):
            degree = self.closed("]", depth) if self.take("[") else Fraction(2)
            return _root(self.argument(depth), degree)
        raise _NotArithmetic

    def closed(self, by: str, depth: int) -> Fraction:
        value = self.sum(depth + 1)
        self.need(by)
        return value

    def argument(self, depth: int) -> Fraction:
        self.need("{")
        return self.closed("}", depth)


def _number(match: re.Match[str]) -> Fraction:
    digits, repeats = match["number"].replace(",", ""), match["repeats"]
    if digits == "." if repeats is None else "." not in digits:
        raise _NotArithmetic
    value = Fraction(f"0{digits}")
    if repeats:
        places = len(digits.partition(".")[2])
        value += Fraction(int(repeats), (10 ** len(repeats) - 1) * 10**places)
    return value


def _bounded(value: Fraction) -> Fraction:
    if value.numerator.bit_length() > MAX_BITS or value.denominator.bit_length() > MAX_BITS:
        raise TooLarge
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        if base < 0:
            raise _NotArithmetic
        base, exponent = _root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator)
    if base == 0 and exponent <= 0:
        raise _NotArithmetic
    if abs(base) in (0, 1):
        return base if base >= 0 or exponent % 2 else -base
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > MAX_BITS:
        raise TooLarge
    return base ** int(exponent)


def _root(value: Fraction, degree: Fraction) -> Fraction:
    """The real root, where it is rational."""
    if degree.denominator != 1 or not 2 <= degree <= 64 or value < 0:
        raise _NotArithmetic
    found = [_whole_root(part, int(degree)) for part in (value.numerator, value.denominator)]
    return Fraction(*found)


def _whole_root(value: int, degree: int) -> int:
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**degree < value else (low, middle)
    if low**degree != value:
        raise _NotArithmetic
    return low


def _argument(value: Fraction) -> int:
    if value.denominator != 1 or value < 0:
        raise _NotArithmetic
    if value > _MAX_ARGUMENT:
        raise TooLarge
    return int(value)


def notation(text: str) -> str | None:
    """The normal form of a numeral with its base (``2516_8``), a clock time or a ratio; None for any other text.

    ``base 8 1358``; ``clock 03:30:00`` with `` am`` or `` pm``; ``ratio 2:3`` in lowest terms.
    """
    if match := _NUMERAL.fullmatch(text):
        base = int(match[2] or match[3])
        try:
            return f"base {base} {int(match[1], base)}" if 2 <= base <= 36 else f"base {base} {match[1]}"
        except ValueError:  # it has a digit that its base has not
            return f"base {base} {match[1]}"
    if (match := _CLOCK.fullmatch(text)) and int(match[1]) <= 24:
        half = f" {match[4].lower()}m" if match[4] else ""
        return f"clock {int(match[1]):02}:{match[2]}:{match[3] or '00'}{half}"
    if _RATIO.fullmatch(text):
        terms = [int(term) for term in text.split(":")]
        least = math.gcd(*terms) or 1
        return "ratio " + ":".join(str(term // least) for term in terms)
    return None


def same_notation(gold: str, answer: str) -> bool:
    """Whether two normal forms mean the same. A clock that does not say which half of the day it means fits either."""
    if gold == answer:
        return True
    if gold.startswith("clock ") and answer.startswith("clock "):
        (time, is_known), (other, other_is_known) = _seconds(gold), _seconds(answer)
        if is_known == other_is_known:
            return is_known and time == other
        return (time - other) % (12 * 3600) == 0
    # 10:15 may be a ratio, and 2:3 is no clock; two clocks are compared as clocks alone.
    return ratio(gold) == ratio(answer) is not None


def ratio(form: str) -> Fraction | None:
    """The quotient of a ratio of two numbers, or of a clock that may be one."""
    match = re.fullmatch("ratio ([0-9]+):([0-9]+)|clock ([0-9]+):([0-9]+):00", form)
    if match is None:
        return None
    over, under = (int(term) for term in match.groups() if term is not None)
    return Fraction(over, under) if under else None


def _seconds(clock: str) -> tuple[int, bool]:
    """(seconds of the day, whether the half of the day is known)."""
    time, _, half = clock.removeprefix("clock ").partition(" ")
    hours, minutes, seconds = map(int, time.split(":"))
    if half and hours <= 12:
        hours = hours % 12 + 12 * (half == "pm")
    return hours * 3600 + minutes * 60 + seconds, bool(half) or hours > 12 or hours == 0
