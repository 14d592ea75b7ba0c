"""A table of gold and answer pairs with verdicts.

``tests/data/answers.tsv`` has, by row: gold; answer; ``right``, the verdict by hand; ``sympy``, whether the two values are equal,
derived with sympy 1.14 (rationals, factorials, binomials, roots) from Python expressions that were written beside the LaTeX when
the table was made; ``math-verify``, what math-verify 0.9.0 says of the pair (``raises`` where it raises); and a star where one of
the two sources does not give the verdict. A dash: units, notations, words and sets have no value to derive. Golds are exact:
0.333333 is not 1/3, as by sympy, though math-verify rounds to six places. An answer must be in the notation of the gold: 1358 is
no answer to "write 1358 in base 8", though 2516_8 has that value.
"""

from pathlib import Path

import pytest

from jaxreason.rewards import exact, units
from jaxreason.rewards.answer import accuracy
from jaxreason.rewards.sample import Sample
from jaxreason.text import boxed, without_emphasis

PATH = Path(__file__).parent / "data" / "answers.tsv"
HEADER, *ROWS = [line.split("\t") for line in PATH.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


def graded(gold, text, **options):
    return accuracy(Sample("q", f"<think>x</think>\n{text}", gold, 3, 9, False), **options)


def test_every_verdict_of_the_table():
    """In one test, so that math-verify is loaded once; every wrong one is shown."""
    assert len(ROWS) >= 300 and HEADER == ["gold", "answer", "right", "sympy", "math-verify", "mark"]
    found = [(gold, answer, right, graded(gold, rf"\boxed{{{answer}}}")) for gold, answer, right, *_ in ROWS]
    assert [row for row in found if row[3] != int(row[2])] == []


def test_the_table_s_sources_agree_with_its_verdicts_or_are_marked():
    for gold, answer, right, sympy, math_verify, mark in ROWS:
        assert right in "01" and sympy in ("0", "1", "-") and math_verify in ("0", "1", "raises")
        assert sympy in ("-", right), (gold, answer)  # sympy and the hand never disagree
        assert mark == ("*" if math_verify != right else ""), (gold, answer)
    assert sum(sympy != "-" for *_, sympy, _, _ in ROWS) > 150


def test_math_verify_says_what_the_table_says_of_it():
    """Of every tenth row, as the installed version says it."""
    library = pytest.importorskip("math_verify")
    read = lambda text: library.parse(  # noqa: E731
        f"${text}$", [library.LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    for gold, answer, _, _, said, _ in [row for row in ROWS if row[4] in "01"][::10]:
        of_gold, of_answer = read(gold), read(answer)
        found = bool(of_gold and of_answer and library.verify(of_gold, of_answer, timeout_seconds=None))
        assert str(int(found)) == said, (gold, answer)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("**73**", 1), ("**Answer:** 73", 1), ("**Answer: 73**", 1), ("The answer is **73**.", 1), ("**Final Answer**\n73", 1),
        ("### Answer: 73", 1), ("`73`", 1), ("__73__", 1), ("So, the final answer is: *73*", 1), (r"so \boxed 73", 1),
        (r"\boxed73.", 1), (r"\boxed 7 3", 0), ("**74**", 0), ("**Answer:** 74", 0), ("73**2", 0), (r"\boxed 74 or 73", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("symbolic", ["auto", "never"])
def test_markdown_and_a_box_without_braces_are_read(text, reward, symbolic):
    assert graded("73", text, symbolic=symbolic) == reward


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed 5 and \boxed{6}", ["5", "6"]), (r"\boxed -3.5, so", ["-3.5"]), (r"\boxed A.", ["A"]),
        (r"\boxed\frac12", [r"\frac12"]),
        (r"\boxed{\boxed 5}", [r"\boxed 5"]), (r"\boxed apples", []), (r"\boxedx", []), (r"\boxed 1,000", ["1,000"]),
    ],
)  # fmt: skip
def test_what_a_box_without_braces_holds(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize("text", ["2**10", "2 ** 3 ** 4", "a*b*c", "(1)*2*(3)", "x__y__z", "** 5", "* 5"])
def test_stars_that_are_no_emphasis_stay(text):
    assert without_emphasis(text) == text


@pytest.mark.parametrize("text", ["1001!", "9^{9^{9}}", "2^{20001}", r"\binom{1001}{2}", "(2^{15000})^2", "2^{15000}*2^{15000}"])
def test_arithmetic_is_bounded(text):
    with pytest.raises(exact.TooLarge):
        exact.rational(text)


@pytest.mark.parametrize(
    "text",
    ["(" * 60 + "1" + ")" * 60, "5!!", "1 2", "2x", "0^0", "5/0", "1/2(3)", "", ".", "(-1)!", "(1/2)!", "2^"],
)
def test_what_is_no_arithmetic_is_none(text):
    assert exact.rational(text) is None


def test_units_by_grammar():
    read = lambda tail, *spoken: units.read(tail, frozenset(spoken))  # noqa: E731
    assert read("apples") == read("apple") == "apple" and read("berries") == "berry" and read("boxes") == "box"
    assert read("green apples") == "green apple" and read("cm") == "cm" and read("ft^2") == "foot2" and read("") == ""
    assert read("xy") is read("abc") is read("million") is read("times as many") is read("pi") is read("or more") is None
    assert read("xy", "xy") == "xy"  # \text{ xy} says that it is a word
    assert units.agree("apple", "") and units.agree("green apple", "apple") and not units.agree("green apple", "red apple")
    assert units.agree("degree", "degree celsius") and not units.agree("apple", "apple per day")


def test_a_rational_gold_needs_no_math_verify(monkeypatch):
    from jaxreason.rewards import values

    monkeypatch.setattr(values, "load_math_verify", lambda: pytest.fail("loaded"))
    assert graded("2^{100}", r"\boxed{4^{50}}") == 1 and graded(r"\frac{5!}{52!}", r"\boxed{\frac{6!}{52!}}") == 0
    assert graded("2^{100}", r"\boxed{4^{50}}", symbolic="never") == 0  # which knows no arithmetic: 3+4 is no answer to 3+4
