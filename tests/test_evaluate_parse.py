"""Answers that are easily misread: what each task's parser takes for the answer, and what it takes for none."""

import pytest

from jaxreason.evaluate.tasks import Problem, parse
from jaxreason.rewards.sample import Sample, final_span

CHOICES = Problem("q", "B", choices=("a dog", "a cat", "a bird", "B or C"))
TEN = Problem("q", "I", choices=tuple(f"thing {i}" for i in range(10)))
NOTHING = Problem("q", "1")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("**B**", "B"), ("b", "B"), ("B) a cat", "B"), ("B. a cat", "B"), ("a cat", "B"),
        ("A cat.", "B"), ("The answer is B.", "B"), ("The answer is (B).", "B"), ("The answer is **B**.", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"), ("The answer is: B) a cat", "B"), (r"\boxed{B}", "B"), (r"\boxed{\text{B}}", "B"),
        (r"\boxed{(B)}", "B"), ("<answer>B</answer>", "B"), ("the answer is option B", "B"),
        ("The answer is B because it purrs.", "B"),
        ("(A) is wrong, the answer is B", "B"), ("The answer is A. No, wait: the answer is B.", "B"),
        ("A and C are wrong.\nThe answer is B.", "B"), ("The answer is A horse.", None), ("The answer is A bird.", "C"),
        ("The answer is A because it barks.", "A"),
        ("A or B", None), ("The answer is A or B.", None), ("The answer is A and B.", None), ("The answer is A/B", None),
        ("(A) or (B)", None), (r"\boxed{A} \boxed{B}", None), (r"\boxed{B} and so \boxed{B}", "B"), (r"\boxed{A or B}", None),
        (r"\boxed{B", None), ("<answer>B", None), ("<answer>A</answer><answer>B</answer>", None), ("The answer is not A.", None),
        ("The answer is E.", None), ("I think it is B", None), ("", None), ("B or C", "D"), ("The answer is a cat.", "B"),
        ("Both A and B look right, but the answer is C, not B.", "C"), ("Because", None), ("Answer", None),
        ("The answer is", None),
    ],
)  # fmt: skip
def test_a_letter(text, answer):
    assert parse.letter(text, CHOICES) == answer


def test_a_letter_that_is_a_word():
    """Ten choices have an "I", which is also the first word of many sentences."""
    assert parse.letter("I", TEN) == parse.letter("The answer is I.", TEN) == "I"
    assert parse.letter("I do not know", TEN) is None
    assert parse.letter("The answer is I think none", TEN) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"), ("The answer is 42.", "42"), ("#### 42", "42"), ("So 6 * 7 = 42.\n#### 42", "42"), (r"\boxed{42}", "42"),
        ("The answer is 1,234.", "1234"), ("The answer is $1,234.50.", "2469/2"), (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{\$5}", "5"), ("The answer is -5.", "-5"), ("The answer is −5.", "-5"), ("The answer is - 5", "-5"),
        ("The answer is -$5.", "-5"), ("The answer is 42 apples.", "42"), (r"\boxed{42\text{ apples}}", "42"),
        ("The answer is 42%.", "42"),
        ("The answer is 3/4.", "3/4"), (r"\boxed{\frac{3}{4}}", "3/4"), ("The answer is 0.5 kg.", "1/2"),
        ("The answer is .5", "1/2"),
        ("The answer is 6 * 7 = 42.", "42"), ("The answer is x = 42.", "42"), ("The answer is about 42 miles.", "42"),
        ("The answer is 12 (3 a day for 4 days).", "12"), ("The answer is 7. Then I checked: the answer is 8.", "8"),
        ("<answer>42</answer>", "42"), ("answer: **42**", "42"), ("The final answer is: $42$.", "42"), ("Answer = 42", "42"),
        ("The answer is 3 or 4.", None), ("The answer is 3 and 4.", None), ("The answer is 3-4.", None),
        ("The answer is 3, 4.", None),
        (r"\boxed{3} or \boxed{4}", None), (r"\boxed{3 or 4}", None), (r"\boxed{42", None), ("He has 42 apples", None),
        ("First 3 and then 42", None), ("The answer is 6 * 7.", None), ("The answer is unknown, maybe 5.", None),
        ("The answer is ４２.", None), ("The answer is 4 million.", "4"), ("The answer is 2^10.", None),
        ("The answer is 1,23.", None), ("", None),
        ("The answer is 5\nThe next question has 7", "5"), ("The answer is 10:30", None),
    ],
)  # fmt: skip
def test_a_number(text, answer):
    assert parse.number(text, NOTHING) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $x = \boxed{\frac{1}{2}}$", "1/2"), (r"\boxed{0.5} and \boxed{\frac12}", "1/2"),
        (r"\boxed{5\text{ cm}}", r"5\text{ cm}"), (r"\boxed{\boxed{x}}", "x"), (r"\boxed{x^2} \boxed{x^2}", "x^2"),
        (r"\boxed{x} \boxed{y}", None), (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left(3, \frac{\pi}{2}\right)"),
        (r"The answer is $\sqrt{2}$.", r"\sqrt{2}"), (r"\boxed{}", None), (r"\boxed{x", None), ("x" * 3000, None),
    ],
)  # fmt: skip
def test_a_formula(text, answer):
    assert parse.expression(text, NOTHING) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (10 - 4) * (13 - 9)", "(10 - 4) * (13 - 9)"),
        ("The answer is (10 - 4) * (13 - 9) = 24.", "(10 - 4) * (13 - 9) = 24"),
        ("13 - 9 = 4 (left: 4 4 10)\nAnswer: (10 - 4) * (13 - 9)", "(10 - 4) * (13 - 9)"), (r"\boxed{1+2}", "1+2"),
        ("`1 + 2`", "1 + 2"),
        (r"\boxed{1+2} \boxed{3+4}", None), ("The answer is 1.5 * 2", "1.5 * 2"),
    ],
)  # fmt: skip
def test_an_equation(text, answer):
    assert parse.equation(text, NOTHING) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is [1, 2, -3].", "[1, 2, -3]"), ("[1,2]", "[1, 2]"), ("1, 2, 3", "[1, 2, 3]"),
        ("The answer is [1, 2] or [2, 1]", None),
        ("First [3, 1] is sorted.\nThe answer is [1, 3].", "[1, 3]"), ("The answer is [1, two]", None), ("[]", None),
        ("[1, 2.5]", None),
        ("The answer is [−5, 1]", "[-5, 1]"),
    ],
)  # fmt: skip
def test_a_list(text, answer):
    assert parse.integers(text, NOTHING) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is correct.", "correct"), ("The answer is step 3.", "step 3"), ("Answer: Step 3", "step 3"),
        ("correct", "correct"),
        ("The answer is incorrect.", None), ("The answer is not correct.", None), ("The answer is wrong, step 2.", "step 2"),
        ("Step 1 is right. The answer is step 2.", "step 2"), ("The answer is step 2 or 3.", None),
    ],
)  # fmt: skip
def test_a_verdict(text, answer):
    assert parse.first_error(text, NOTHING) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>The answer is 5.</think>The answer is 6.", "6"), ("<think>The answer is 5.", None),
        ("The answer is 5.</think>6", "6"),
        (r"<think>\boxed{5}</think>I am not sure.", None), (r"<think>\boxed{5}</think>" + r"\boxed{6}", "6"),
        ("<think>a</think>The answer is 5.<think>The answer is 6.", None),
    ],
)  # fmt: skip
def test_an_answer_inside_the_thought_is_none(completion, answer):
    span = final_span(Sample("q", completion, None, 1, 9, False))
    assert (None if span is None else parse.number(span, NOTHING)) == answer
