"""Answer extraction and comparison, with the tricks that a policy finds."""

import sys
from fractions import Fraction

import pytest

from jaxreason.errors import UserError
from jaxreason.rewards import Sample, answer, values
from jaxreason.rewards.answer import accuracy, extract
from jaxreason.text import boxed


def sample(completion: str, gold: str | None = "5", prompt: str = "2+3?") -> Sample:
    return Sample(prompt, completion, gold, completion_tokens=8, max_completion_tokens=64, truncated=False)


def graded(content: str, gold: str | None, **options) -> float | None:
    return accuracy(sample(f"<think>hm</think>\n\\boxed{{{content}}}", gold), **options)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{5}", ["5"]),
        (r"a \boxed {5} b \fbox{6}", ["5"]),
        (r"\fboxed{7}", ["7"]),
        (r"\boxed{\frac{1}{\sqrt{2}}}", [r"\frac{1}{\sqrt{2}}"]),
        (r"\boxed{\boxed{5}}", [r"\boxed{5}"]),
        (r"\boxed{\{1, 2}", [r"\{1, 2"]),
        (r"{ \boxed{5} } }", ["5"]),
        (r"\boxed{5} or \boxed{6}", ["5", "6"]),
        (r"\boxed{5", None),
        (r"\boxed{5} then \boxed{6", None),
        (r"\boxed{5 then \boxed{6}", None),
        (r"\\boxed{5}", []),
        ("", []),
    ],
)
def test_boxed_balances_braces(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("completion", "prompt", "found"),
    [
        (r"<think>x</think>\boxed{5}", "q", ["5"]),
        (r"<think>\boxed{5}</think>\boxed{6}", "q", ["6"]),
        (r"<think>\boxed{5}</think> done", "q", ["done"]),
        (r"<think>\boxed{5}", "q", []),
        (r"\boxed{5}", "<|assistant|><think>\n", []),  # the prompt opened <think>: all of this is reasoning
        (r"x</think>\boxed{5}", "<|assistant|><think>\n", ["5"]),
        (r"<think>a</think>\boxed{5}<think>b", "q", []),
        (r"<think>a</think>\boxed{4}</think>\boxed{5}", "q", ["5"]),
        (r"\boxed{5}", "Is </think>\\boxed{9} or <think> right?", ["5"]),  # tags of the user are not the model's
        (r"\boxed{\boxed{5}}", "q", ["5"]),
        ("The answer is 5.", "q", ["5."]),
        ("Answer: 5", "q", ["5"]),
        ("#### 5", "q", ["5"]),
        ("<answer> 5 </answer>", "q", ["5"]),
        ("<answer>5", "q", []),
        ("5</answer>", "q", []),
        (r"<answer>\boxed{5}</answer>", "q", ["5"]),
        (r"5 \boxed{5", "q", []),
        ("", "q", []),
        ("  \n", "q", []),
    ],
)
def test_the_answer_stands_in_the_final_span_only(completion, prompt, found):
    assert extract(sample(completion, prompt=prompt)) == found


def test_answer_in_restricts_where_it_is_looked_for():
    both = sample(r"<answer>4</answer> \boxed{5}")
    assert extract(both, answer_in="boxed") == ["5"]
    assert extract(both, answer_in="tag") == ["4"]
    assert extract(sample("5"), answer_in="boxed") == extract(sample("5"), answer_in="tag") == []
    assert extract(sample("It is 5"), answer_in="text") == ["It is 5"]  # never the last number of a sentence


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("5", 5, ""), ("-5", -5, ""), ("\u22125", -5, ""), ("007", 7, ""), ("+5.", 5, ""), (".5", Fraction(1, 2), ""),
        ("1,234,567", 1234567, ""), ("1{,}234.5", Fraction(2469, 2), ""), (r"10\,000", 10000, ""),
        ("$1/3$", Fraction(1, 3), ""), (r"\(\dfrac{-1}{3}\)", Fraction(-1, 3), ""), (r"-\frac12", Fraction(-1, 2), ""),
        ("1 1/2", Fraction(3, 2), ""), (r"-2\frac{1}{4}", Fraction(-9, 4), ""), ("(5)", 5, ""), ("x = 5", 5, ""),
        ("1.5e3", 1500, ""), (r"2 \times 10^{-2}", Fraction(1, 50), ""), (r"\$1,000.50", Fraction(2001, 2), ""),
        (r"50\%", 50, "%"), ("50 percent", 50, "%"), (r"12\text{ cm}", 12, "cm"), ("12 square feet", 12, "foot2"),
        (r"12\text{ cm}^2", 12, "cm2"), ("60 miles per hour", 60, "mile/hour"), (r"90^\circ", 90, "degree"),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(text, number, unit):
    value = values.read(text)
    assert (value.kind, value.number, value.unit) == ("number", number, unit)


@pytest.mark.parametrize(
    "text",
    ["5x", "5 million", "5 or 6", "5 6", "1,2", "1,23", "1,234,5", "5/0", r"\frac{5}{0}", "1e9999", "5/6/7", "5-"],
)
def test_what_only_begins_with_a_number_is_none(text):
    assert values.read(text).number is None


@pytest.mark.parametrize("text", ["", "  ", "$$", "٣", "３", "५", "x=٣", "⑤", "5" * 2001])
def test_what_cannot_be_read(text):
    assert values.read(text) is None


@pytest.mark.parametrize(
    ("gold", "content", "reward"),
    [
        ("1234", "1,234", 1), ("0.5", r"\frac{1}{2}", 1), ("5", "5.0", 1), ("5", "5.0001", 0), ("1/3", "0.333", 0),
        ("5", "-5", 0), ("50%", "50", 1), ("50%", "0.5", 1), ("50", r"50\%", 1), ("0.5", "50%", 1), ("50%", "5", 0),
        ("50%", "50 cm", 0), ("12 cm", "12", 1), ("12 cm", "12 centimeters", 1), ("12 cm", "12 miles", 0),
        ("12 cm", "12 m", 0), ("12", "12 dollars", 1), ("12", "12 million", 0),
        ("Evelyn", r"\text{evelyn}", 1), ("A", r"\text{(A)}", 1), ("A", "B", 0), ("dog", "god", 0), ("x", "X", 1),
        ("1", "1 or 2", 0), ("2", "1 or 2", 0), ("2", r"1\text{ or }2", 0), ("1 or 2", r"1\text{ or }2", 1),
        ("1", "1,2", 0), ("2", r"\pm 2", 0), ("5", r"\{5,6\}", 0), ("5", "x<6", 0), ("5", "5; 6", 0), 
        ("5", r"5 \quad 6", 0),
        ("3", "٣", 0), ("3", "３", 0), ("5", "", 0), ("5", "9" * 100_000, 0), ("5", r"\frac{5}{0}", 0),
        ("the solution is #### 5", "5", 1), (r"so \boxed{4}, no: \boxed{5}", "5", 1),
        (None, "5", None), ("", "5", None), ("٣", "3", None), (r"\boxed{5", "5", None), ("9" * 5000, "5", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("symbolic", ["auto", "never"])
def test_accuracy_without_formulas(gold, content, reward, symbolic):
    assert graded(content, gold, symbolic=symbolic) == reward


@pytest.mark.parametrize(
    ("gold", "content", "reward"),
    [
        (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2", 1), (r"\frac{\sqrt{3}}{2}", r"\frac{3}{2\sqrt{3}}", 1), 
        ("1024", "2^{10}", 1),
        ("x^2+2x+1", "(x+1)^2", 1), ("x^2+2x+1", "(x-1)^2", 0), ("(1,2)", "(1, 2)", 1),
        ("1,2", "2,1", 1), ("1,2", "1", 0),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1),
        ("1<x<2", "(1,2)", 1), ("(1,2)", "1<x<2", 0),  # gold first: the swapped call would say the opposite
        (r"\frac{1}{", "1", None), (r"\frac{1}{", r"\frac{1}{", None), (r"\frac{1}{", "", None),
    ],
)  # fmt: skip
def test_accuracy_of_formulas(gold, content, reward):
    assert graded(content, gold) == reward


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("2", "1 + 1 = 2.", 1), ("2", "1 + 1 = 3.", 0), ("x^2+1", "$1 + x^2$.", 1), (r"\{1,2\}", r"\{2,1\}.", 1),
        (r"\sqrt{2}", r"\(\frac{2}{\sqrt{2}}\).", 1), (r"\sqrt{2}", r"\(\frac{2}{\sqrt{2}}.\)", 1), ("x/2", r"0.5x\;", 1),
    ],
)  # fmt: skip
def test_a_sentence_around_a_formula_may_end(gold, text, reward):
    assert accuracy(sample(text, gold)) == reward


def test_gold_formulas_without_math_verify_name_the_extra(monkeypatch):
    monkeypatch.setattr(values, "is_math_verify_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    values.load_math_verify.cache_clear()
    values._parse.cache_clear()
    with pytest.raises(UserError, match=r"jaxreason\[math\].*symbolic: never"):
        graded("1", r"\sqrt{7}")
    assert graded(r"\sqrt{7}", r"\sqrt{ 7}", symbolic="never") == 1
    assert graded("5", "5") == 1
    assert graded(r"\sqrt{25}", "5") == 1 and graded(r"\log_2 32", "5") == 0  # a number as gold needs no library


def test_several_boxes():
    different = sample(r"\boxed{4} no, \boxed{5}")
    assert accuracy(different) == 0
    assert accuracy(different, multiple_boxed="last") == 1
    assert accuracy(sample(r"\boxed{5} no, \boxed{4}"), multiple_boxed="last") == 0
    assert accuracy(sample(r"\boxed{5.0}, that is \boxed{5}")) == 1
    assert accuracy(sample(r"\boxed{٣} \boxed{5}")) == 0
    assert accuracy(sample("<answer>4</answer><answer>5</answer>")) == 0
    assert accuracy(sample(r"<think>\boxed{4}</think> \boxed{5}")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000, "5" * 100_000, r"\boxed{" * 14_000, r"\boxed{" * 12_000 + "5" + "}" * 12_000, "{" * 100_000,
        r"\boxed{5}" * 11_000 + r"\boxed{6}", "<think>" * 14_000, "</think>" * 12_000, "\\" * 100_000, " " * 100_000,
        r"\boxed{" + "\\frac{1}{" * 11_000 + "2" + "}" * 11_000 + "}", "<answer>" * 12_000,
    ],
    ids=lambda text: f"{text[:8]}-{len(text)}",
)  # fmt: skip
def test_100_kB_of_text_is_wrong_in_linear_work(text):
    assert accuracy(sample(text)) == 0  # quadratic work would take minutes here


def test_prepare_loads_what_a_sample_would_wait_for(monkeypatch):
    loaded = []
    monkeypatch.setattr(values, "load_math_verify", lambda: loaded.append(1))
    answer.prepare(symbolic="never")
    assert loaded == []
    answer.prepare()
    assert loaded == [1]
