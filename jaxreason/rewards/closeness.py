"""Whether formulas that math-verify takes for the same also agree in 30 digits: its own comparison rounds to six places."""

from collections.abc import Iterable
from typing import Any

_DIGITS = 50
_TOLERANCE = 1e-30  # relative, of numbers that are written exactly
_FLOAT_TOLERANCE = 1e-12  # of a decimal in a formula, which sympy keeps in 15 digits


def any_close(golds: Iterable[Any], answers: Iterable[Any]) -> bool:
    """Whether some reading of the gold and some reading of the answer agree in every number that can be told apart."""
    readings = [[value for value in side if not isinstance(value, str)] for side in (golds, answers)]
    return not all(readings) or any(close(one, other) for one in readings[0] for other in readings[1])


def close(one: Any, other: Any) -> bool:
    """Numbers by value, sets by their elements, and tuples, intervals, matrices and relations part by part.

    What has a variable in it, or is of two kinds, is left to math-verify's word: True.
    """
    import sympy

    if isinstance(one, sympy.FiniteSet) and isinstance(other, sympy.FiniteSet):
        return all(any(close(a, b) for b in there.args) for here, there in ((one, other), (other, one)) for a in here.args)
    if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
        return one.shape == other.shape and all(map(close, one, other))
    if isinstance(one, sympy.Equality) and isinstance(other, sympy.Expr):  # x = 5 and 5
        return close(one.rhs, other)
    if isinstance(other, sympy.Equality) and isinstance(one, sympy.Expr):
        return close(one, other.rhs)
    if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr):
        return _close_formulas(one, other) if one.free_symbols | other.free_symbols else _close_numbers(one, other)
    if isinstance(one, sympy.core.relational.Relational) and isinstance(other, sympy.core.relational.Relational):
        # 2x = 4 and x = 2 are the same relation: only those that differ in a number alone can be told apart here.
        return one.lhs != other.lhs or close(one.rhs, other.rhs)
    if isinstance(one, sympy.Tuple | sympy.Interval) and one.func == getattr(other, "func", None):
        return len(one.args) == len(other.args) and all(map(close, one.args, other.args))
    return True


def _close_formulas(one: Any, other: Any) -> bool:
    """Whether two formulas agree where their variables are some fraction of no meaning, and do not differ by a constant."""
    import sympy

    if one.free_symbols != other.free_symbols:
        return True
    difference = sympy.expand(one - other)
    if not difference.free_symbols:
        return _close_numbers(difference, sympy.Integer(0))
    point = {symbol: sympy.Rational(3 + 7 * i, 5 + 2 * i) for i, symbol in enumerate(sorted(one.free_symbols, key=str))}
    return _close_numbers(one.subs(point), other.subs(point))


def _close_numbers(one: Any, other: Any) -> bool:
    """Whether ``|a - b| <= tolerance max(|a|, |b|)``; of what has no value, whether it is written alike."""
    import sympy

    exact = not (one.has(sympy.Float) or other.has(sympy.Float))
    a, b = one.evalf(_DIGITS), other.evalf(_DIGITS)
    difference, scale = abs(a - b), max((abs(a), abs(b)), key=lambda size: size if size.is_Float else 0)
    if not (difference.is_number and difference.is_comparable and scale.is_comparable):
        return bool(one == other)
    if difference <= (_TOLERANCE if exact else _FLOAT_TOLERANCE) * scale:
        return True
    # A number that is zero without showing it has no digits to compare.
    return bool(scale < _TOLERANCE and sympy.simplify(one - other) == 0)
