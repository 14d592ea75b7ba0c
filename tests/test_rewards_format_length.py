"""Structure, length and repetition rewards against values worked out by hand."""

import pytest

from jaxreason.errors import UserError
from jaxreason.rewards import Sample
from jaxreason.rewards.format import format, tag_count
from jaxreason.rewards.language import language
from jaxreason.rewards.length import cosine, length, repetition, soft_overlong


def sample(completion="", tokens=10, limit=100, gold="5", prompt="q", truncated=False) -> Sample:
    return Sample(prompt, completion, gold, tokens, limit, truncated)


@pytest.mark.parametrize(
    ("completion", "think", "r1"),
    [
        ("<think>\na\n</think>\n5", 1, 0),
        ("\n<think>a</think>5\n", 1, 0),
        ("<think>a</think><answer>5</answer>", 0, 1),
        ("<think>\na\n</think>\n<answer>\n5\n</answer>\n", 0, 1),
        ("<think>a</think> so <answer>5</answer>", 0, 0),
        ("<think>a</think><answer>5</answer> bye", 0, 0),
        ("<think>a</think><answer> </answer>", 0, 0),
        ("<answer>5</answer><think>a</think>", 0, 0),
        ("hello <think>a</think>5", 0, 0),
        ("<think> </think>5", 0, 0),
        ("<think>a</think> ", 0, 0),
        ("<think>a", 0, 0),
        ("a</think>5", 0, 0),
        ("</think>a<think>5", 0, 0),
        ("<think>a<think>b</think>5", 0, 0),
        ("<think>a</think>b</think>5", 0, 0),
        ("<THINK>a</THINK>5", 0, 0),
        ("", 0, 0),
        ("<think>" * 14_000, 0, 0),
    ],
)
def test_format(completion, think, r1):
    assert (format(sample(completion)), format(sample(completion), template="r1")) == (think, r1)


def test_format_of_a_prompt_that_opens_think_and_of_a_cut_completion():
    assert format(sample("a</think>5", prompt="<|assistant|><think>\n")) == 1
    assert format(sample("<think>a</think>5", prompt="<|assistant|><think>\n")) == 0  # opened twice
    assert format(sample("<think>a</think>5", prompt="what is <think>?")) == 1
    assert format(sample("<think>a</think>5", truncated=True)) == 0


@pytest.mark.parametrize(
    ("completion", "think", "r1"),
    [
        ("<think>a</think><answer>5</answer>", 1, 1),
        ("<think>a</think>5", 1, 0.5),
        ("<think>a", 0.5, 0.25),
        ("<think><think>a</think>", 0.5, 0.25),
        ("</think><think>", 1, 0.5),
        ("", 0, 0),
    ],
)
def test_tag_count(completion, think, r1):
    assert (tag_count(sample(completion)), tag_count(sample(completion), template="r1")) == (think, r1)
    assert tag_count(sample("a</think>5", prompt="<think>")) == 1


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (95, -0.75), (100, -1), (101, -1), (500, -1)]
)
def test_soft_overlong_is_dapo_equation_13(tokens, expected):
    assert soft_overlong(sample(tokens=tokens), cache_tokens=20) == pytest.approx(expected)
    assert soft_overlong(sample(tokens=tokens, limit=999), cache_tokens=20, max_tokens=100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "right", "wrong"),
    [(0, 1.0, -1.0), (25, 0.5 + 0.25 * (1 + 2**-0.5), -0.5 - 0.25 * (1 + 2**-0.5)), (50, 0.75, -0.75), (100, 0.5, -0.5),
     (300, 0.5, -0.5)],
)  # fmt: skip
def test_cosine_has_the_values_of_open_r1(tokens, right, wrong):
    assert cosine(sample(r"\boxed{5}", tokens)) == pytest.approx(right)
    assert cosine(sample(r"\boxed{4}", tokens)) == pytest.approx(wrong)
    assert cosine(sample(r"\boxed{5}", tokens, gold=None)) is None


def test_cosine_takes_its_bounds_and_the_options_of_accuracy():
    both = sample(r"\boxed{4} \boxed{5}", tokens=0)
    assert cosine(both, max_value_correct=3.0, multiple_boxed="last") == 3
    assert cosine(both, min_value_wrong=-2.0) == -2
    assert cosine(sample("5", tokens=64, limit=100), max_tokens=64) == 0.5


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (20, 0), (60, -0.5), (100, -1), (200, -1)])
def test_linear_length(tokens, expected):
    assert length(sample(tokens=tokens), free_tokens=20) == pytest.approx(expected)


@pytest.mark.parametrize("reward", [length, lambda s: soft_overlong(s, cache_tokens=50), cosine])
def test_lengths_are_tokens_never_characters(reward):
    short, long = "5", "5" + " " * 5000
    assert reward(sample(short, tokens=70)) == reward(sample(long, tokens=70)) != reward(sample(short, tokens=90))


@pytest.mark.parametrize(
    ("text", "ngram_size", "expected"),
    [
        ("a b c d", 2, 0), ("a b a b a", 2, -0.5), ("a a a a a", 1, -0.8), ("A a", 1, -0.5), ("a b", 3, 0), ("", 3, 0),
        ("a b c a b c", 3, -0.25),
        ("a b a c a d", 3, 0.0),  # words that come again, in no trigram that does
    ],
)  # fmt: skip
def test_repetition(text, ngram_size, expected):
    assert repetition(sample(text), ngram_size=ngram_size) == pytest.approx(expected)
    assert repetition(sample(text), ngram_size=ngram_size, max_penalty=-2.0) == pytest.approx(2 * expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: soft_overlong(s, cache_tokens=0), "cache_tokens is 0; give 1 to 100"),
        (lambda s: soft_overlong(s, cache_tokens=101), "cache_tokens is 101"),
        (lambda s: length(s, free_tokens=100), "free_tokens is 100; give 0 to 99"),
        (lambda s: cosine(s, max_tokens=0), "max_tokens is 0"),
        (lambda s: repetition(s, ngram_size=0), "ngram_size 0"),
        (lambda s: repetition(s, max_penalty=1.0), "max_penalty 1.0"),
    ],
)
def test_options_that_make_no_sense(call, message):
    with pytest.raises(UserError, match=message):
        call(sample("5"))


@pytest.mark.parametrize(
    ("completion", "wanted", "expected"),
    [
        ("<think>We add them</think>五", "en", 1.0),  # the answer does not count
        ("<think>We add 所以</think>5", "en", 0.5),  # two words, and two letters that are words
        ("<think>We add 所以</think>5", "zh", 0.5),
        ("<think>We add</think>", "ru", 0.0),
        ("<think>x = 5, α = 3 得</think>", "zh", 1.0),  # names of quantities are no words
        (r"<think>得 $so what$ \(never mind\) \[or this\] $$and that$$ \frac{1}{2} ```return value```</think>", "zh", 1.0),
        ("<think>得 $so what</think>", "zh", 1 / 3),  # a formula that is not closed is text
        ("<think>r\u00e9sum\u00e9 re\u0301sume\u0301</think>", "en", 1.0),  # with marks of their own or without
        ("<think>\uff46\uff55\uff4c\uff4c</think>", "en", 1.0),  # full width
        ("<think>これは漢字</think>", "ja", 1.0),
        ("<think>हिन्दी में</think>", "hi", 1.0),
        ("<think>12 + 3</think>", "en", 0.0),
        ("no tags at all да", "en", 0.8),
        ("", "en", 0.0),
    ],
)  # fmt: skip
def test_language_is_the_share_of_the_thought_s_words(completion, wanted, expected):
    assert language(sample(completion), language=wanted) == pytest.approx(expected)


def test_language_of_a_thought_that_the_prompt_opened():
    assert language(sample("да нет</think> yes", prompt="q <think>"), language="ru") == 1.0
