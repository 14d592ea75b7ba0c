import json

import pytest

from jaxreason.data.example import split_thought
from jaxreason.data.schema import SCHEMAS, Example, Reject, detect, parse
from jaxreason.text import last_boxed

R1 = "<think>\nfirst\n</think>\n\nfour"
TAGGED = "<|begin_of_thought|>\n\nfirst\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nfour\n\n<|end_of_solution|>"
OT_SYSTEM = "Answer inside <|begin_of_thought|> and <|begin_of_solution|>."


def turns(*pairs, keys=("role", "content")):
    return [dict(zip(keys, pair)) for pair in pairs]


FORMATS = {
    "openr1": (
        {
            "problem": "2+2?", "solution": "s", "answer": "4", "generations": ["<think>cut", R1],
            "correctness_math_verify": [False, True], "is_reasoning_complete": [False, True],
            "finish_reasons": ["length", "stop"], "messages": turns(("user", "2+2?"), ("assistant", R1)),
        },
        Example("2+2?", "four", "first", gold="4"),
    ),
    "openthoughts_metadata": (
        {
            "problem": "2+2?", "deepseek_reasoning": "first", "deepseek_solution": "four", "domain": "math",
            "ground_truth_solution": "so \\boxed{4}",
        },
        Example("2+2?", "four", "first", gold="4"),
    ),
    "s1": (
        {"question": "2+2?", "solution": "it is \\boxed{4}", "thinking_trajectories": ["first"], "attempt": "four"},
        Example("2+2?", "four", "first", gold="4"),
    ),
    "dolphin_r1": (
        {
            "messages": turns(("system", "be brief"), ("user", "2+2?")), "reasoning": "first", "answer": "four",
            "model": "r1",
        },
        Example("2+2?", "four", "first", "be brief"),
    ),
    "r1_distill": (
        {
            "problem": "2+2?", "solution": "\\boxed{4}", "reannotated_assistant_content": R1,
            "reannotated_messages": turns(("user", "x"), ("assistant", R1)),
        },
        Example("2+2?", "four", "first", gold="4"),
    ),
    "messages": (
        {"messages": turns(("user", "2+2?"), ("assistant", R1)), "num_tokens": 9, "source": "math"},
        Example("2+2?", "four", "first"),
    ),
    "conversations": (
        {"system": OT_SYSTEM, "conversations": turns(("user", "2+2?"), ("assistant", TAGGED), keys=("from", "value"))},
        Example("2+2?", "four", "first"),
    ),
    "prompt_completion": (
        {"prompt": "User: 2+2?\nAssistant:", "completion": R1},
        Example("2+2?", "four", "first"),
    ),
    "problem_answer": (
        {"problem": "2+2?", "solution": "half of \\boxed{8}"},
        Example("2+2?", "half of \\boxed{8}", gold="8"),
    ),
    "example": (
        {"user": "2+2?", "think": "first", "answer": "four", "gold": 4, "system": "be brief"},
        Example("2+2?", "four", "first", "be brief", "4"),
    ),
    "question_answer": (
        {"question": "2+2?", "answer": "two <<2+2=4>> twos\n#### 1,004"},
        Example("2+2?", "two <<2+2=4>> twos\n#### 1,004", gold="1,004"),
    ),
    "text": ({"text": " raw words "}, Example(None, "raw words")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_detected_and_parsed(name):
    row, expected = FORMATS[name]
    assert detect(row) == name
    assert parse(row, name, False) == expected


def test_every_format_has_a_literal_row():
    assert set(SCHEMAS) - set(FORMATS) == {"countdown"}


def test_countdown_gold_is_the_puzzle():
    row = {"nums": [3, 5], "target": 15}
    example = parse(row, detect(row), False)
    assert json.loads(example.gold) == {"nums": [3, 5], "target": 15}
    assert "3, 5" in example.user and "15" in example.user and example.answer is None


@pytest.mark.parametrize(
    "row, schema, expected",
    [
        (  # s1K-1.1
            {"question": "q", "solution": "7", "deepseek_thinking_trajectory": "t", "deepseek_attempt": "a"},
            "s1", Example("q", "a", "t"),
        ),
        (  # OpenThoughts3
            {"conversations": turns(("human", "q"), ("gpt", R1), keys=("from", "value")), "difficulty": 3},
            "conversations", Example("q", "four", "first"),
        ),
        ({"problem": "q", "answer": 12, "solution": ""}, "problem_answer", Example("q", gold="12")),  # DeepScaleR
        (  # OpenMathInstruct-2
            {"problem": "q", "generated_solution": "so 5", "expected_answer": "5"},
            "problem_answer", Example("q", "so 5", gold="5"),
        ),
        ({"prompt": "q", "gold": "5"}, "question_answer", Example("q", "5", gold="5")),
        (  # TRL's conversational prompt and completion
            {"prompt": turns(("user", "q")), "completion": turns(("assistant", R1))},
            "prompt_completion", Example("q", "four", "first"),
        ),
        (
            {"messages": turns(("system", "s"), ("user", "a"), ("assistant", R1), ("user", "b"), ("assistant", "c"))},
            "messages", Example("b", "c", None, "s", None, (("user", "a"), ("assistant", "four"))),
        ),
        ({"messages": turns(("user", "a")), "answer": "9"}, "messages", Example("a", gold="9")),  # a prompt for RL
    ],
)  # fmt: skip
def test_variants(row, schema, expected):
    assert detect(row) == schema
    assert parse(row, schema, False) == expected


@pytest.mark.parametrize(
    "row, schema, reason",
    [
        ({"messages": []}, "messages", "messages is empty or not a list"),
        ({"messages": turns(("tool", "x"))}, "messages", "role 'tool'"),
        ({"messages": turns(("assistant", "x"))}, "messages", "last assistant turn follows no user turn"),
        ({"messages": turns(("user", "x"), ("assistant", " "))}, "messages", "empty content"),
        ({"messages": turns(("user", "x"), ("assistant", "<think>so"))}, "messages", "thought never ends"),
        ({"problem": "x"}, "openr1", "no generations"),
        ({"prompt": 3, "completion": "x"}, "prompt_completion", "prompt is not text"),
        ({"nums": [1, "2"], "target": 3}, "countdown", "nums or target is not a number"),
        ({"completion": "x"}, "prompt_completion", "no prompt"),
    ],
)
def test_rejects_name_the_reason(row, schema, reason):
    with pytest.raises(Reject) as caught:
        parse(row, schema, False)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a</think>b", ("a", "b")),
        ("a</think>b", ("a", "b")),  # the template opened the thought
        ("<think>\n\n</think>\n\nb", ("", "b")),
        ("b uses <think> tags </think> in prose", (None, "b uses <think> tags </think> in prose")),
        (TAGGED, ("first", "four")),
        ("<|begin_of_solution|>b<|end_of_solution|>", (None, "b")),
    ],
)
def test_split_thought(text, expected):
    assert split_thought(text) == expected


def test_a_thought_without_an_answer_is_rejected():
    with pytest.raises(Reject, match="no answer after the thought"):
        split_thought("<think>a</think>  ")


def test_boxed_takes_the_last_and_balances_braces():
    assert last_boxed("\\boxed{1} then \\boxed{\\frac{1}{2}} end") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{1") is None and last_boxed("none") is None and last_boxed("\\boxed{ }") is None
    assert last_boxed("\\boxed{1} \\boxed{\\boxed{5}}") == "5"


def test_openr1_prefers_a_correct_complete_generation():
    row = FORMATS["openr1"][0] | {
        "generations": ["<think>a</think>wrong", "<think>b</think>cut", "<think>c</think>right"],
        "correctness_math_verify": [False, True, True],
        "is_reasoning_complete": [True, False, True],
        "finish_reasons": None,
    }
    assert parse(row, "openr1", False).answer == "right"
    assert parse(row, "openr1", True).answer == "right"
    wrong = row | {"correctness_math_verify": [False, True, False]}
    assert parse(wrong, "openr1", False).answer == "wrong"
    with pytest.raises(Reject, match="no correct complete generation"):
        parse(wrong, "openr1", True)
    # A row that math-verify could not judge counts as correct by the language model's verdict.
    assert parse(wrong | {"correctness_llama": [True, None, None]}, "openr1", True).answer == "wrong"


@pytest.mark.parametrize(
    "columns, outcome",
    [
        ({"correct": True}, None),
        ({"correct": False}, "marked incorrect"),
        ({"deepseek_grade": "No"}, "marked incorrect"),
        ({"deepseek_grade": "Yes"}, None),
        ({"correct": None}, "correctness unknown"),
        ({"correctness_math_verify": [False, None, True]}, None),
    ],
)
def test_keep_only_correct(columns, outcome):
    row = FORMATS["messages"][0] | columns
    if outcome is None:
        assert parse(row, "messages", True).answer == "four"
    else:
        with pytest.raises(Reject, match=outcome):
            parse(row, "messages", True)
    assert parse(row, "messages", False).answer == "four"


def test_unknown_columns_are_named():
    with pytest.raises(Reject, match="columns match no known row format: columns a, b"):
        detect({"b": 1, "a": 2})
