"""The Countdown grader: exact arithmetic over the given numbers, and nothing else."""

import json

import pytest

from jaxreason import rewards
from jaxreason.rewards import Sample
from jaxreason.rewards.countdown import countdown

GOLD = json.dumps({"nums": [3, 5, 7, 7, 7], "target": 24})


def grade(text, gold=GOLD, **options):
    return countdown(Sample("q", text, gold, 10, 99, False), **options)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>3*5=15</think> <answer>(3 * 5) + 7 + 7 - 5</answer>", 0.0),  # the 5 twice
        ("(5 - 3) * 7 + 7 + 3", 0.0),  # 24, but a 3 twice and a 7 not
        ("3 + 7 + 7 + 7", 0.0),  # 24, but without the 5
        ("(7 - 5) * 7 + 3 + 7", 1.0),  # 2 * 7 + 10 = 24
        ("<think>x</think><answer>(7-5)×7+3+7 = 24</answer>", 1.0),
        (r"\boxed{(7-5) \times 7 + 3 + 7}", 1.0),
        (r"The answer is \(\left(7 - 5\right) \cdot 7 + 3 + 7\).", 1.0),
        (r"\[ (7 - 5) \times 7 + 3 + 7 = 24 \]", 1.0),
        (r"$\frac{7}{7} \times 7 + 3 \cdot 5$", 0.0),  # 22
        ("(7-5)*7+3+7 = 25", 1.0),  # what follows the sign is the reader's claim, the expression is the answer
        ("<think>(7-5)*7+3+7</think>", 0.0),
        ("24", 0.0),
        ("7 ** 2 - 5 * 5", 0.0),
        ("24 + 0*(3+5+7+7+7)", 0.0),
        ("7 / (7 - 7) + 3 + 5", 0.0),
        ("__import__('os').getpid()", 0.0),
        ("(" * 5000 + "7", 0.0),
        ("", 0.0),
        ("٧ + 7", 0.0),
        ("True + 7", 0.0),
    ],
)
def test_values(text, reward):
    assert grade(text) == reward


def test_fractions_are_exact():
    gold = json.dumps({"nums": [1, 3, 3], "target": 1})
    assert grade("1 / 3 * 3", gold) == grade(r"\frac{1}{3} \times 3", gold) == 1.0


def test_some_numbers_may_be_left_out_by_choice():
    gold = json.dumps({"nums": [2, 3, 50], "target": 6})
    assert grade("2 * 3", gold) == 0.0
    assert grade("2 * 3", gold, use="some") == 1.0


@pytest.mark.parametrize("gold", [None, "24", "{}", '{"nums": 3, "target": 4}', '{"nums": ["x"], "target": 4}'])
def test_an_unreadable_gold_is_no_reward(gold):
    assert grade("(7 - 5) * 7 + 3 + 7", gold) is None


def test_it_is_found_by_name():
    assert rewards.get("countdown", use="some").options == {"use": "some"}
