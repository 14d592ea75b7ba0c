"""Rewards for length and repetition. Lengths are tokens: characters would pay for short words, not short answers."""

import math
from typing import Literal

from jaxreason.errors import UserError
from jaxreason.rewards.answer import AnswerIn, accuracy
from jaxreason.rewards.sample import Sample


def soft_overlong(sample: Sample, *, cache_tokens: int, max_tokens: int | None = None) -> float:
    """DAPO's soft overlong punishment (2503.14476, eq. 13): 0, then a linear fall to -1 over the last ``cache_tokens``.

    With L completion tokens, L_max = ``max_tokens`` and L_cache = ``cache_tokens``::

        0                              L <= L_max - L_cache
        (L_max - L_cache - L)/L_cache  L_max - L_cache < L <= L_max
        -1                             L > L_max

    Args:
      cache_tokens: width of the fall; DAPO uses 4096 of 20480.
      max_tokens: null for the rollout's ``max_completion_tokens``.
    Raises UserError unless 0 < cache_tokens <= max_tokens.
    """
    limit = _limit(sample, max_tokens)
    if not 0 < cache_tokens <= limit:
        raise UserError(f"reward soft_overlong: cache_tokens is {cache_tokens}; give 1 to {limit}, the length limit")
    over = sample.completion_tokens - (limit - cache_tokens)
    return 0.0 - min(max(over / cache_tokens, 0.0), 1.0)


def cosine(
    sample: Sample,
    *,
    max_tokens: int | None = None,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    answer_in: AnswerIn = "auto",
    multiple_boxed: Literal["wrong", "last"] = "wrong",
    symbolic: Literal["auto", "never"] = "auto",
) -> float | None:
    """Accuracy scaled by length (2502.03373; values of open-r1): short right answers and long wrong ones do better.

    With c = (1 + cos(pi * min(L/L_max, 1)))/2, which falls from 1 to 0: right gives min + (max - min)*c of the correct
    values, wrong gives max - (max - min)*c of the wrong ones. None where ``accuracy`` has no reward, whose options
    ``answer_in``, ``multiple_boxed`` and ``symbolic`` are.
    """
    right = accuracy(sample, answer_in=answer_in, multiple_boxed=multiple_boxed, symbolic=symbolic)
    if right is None:
        return None
    progress = min(sample.completion_tokens / _limit(sample, max_tokens), 1.0)
    scale = (1 + math.cos(math.pi * progress)) / 2
    if right:
        return min_value_correct + (max_value_correct - min_value_correct) * scale
    return max_value_wrong - (max_value_wrong - min_value_wrong) * scale


def length(sample: Sample, *, free_tokens: int = 0, max_tokens: int | None = None) -> float:
    """A linear penalty: 0 up to ``free_tokens``, -1 from ``max_tokens`` (null: ``max_completion_tokens``) on.

    Raises UserError unless 0 <= free_tokens < max_tokens.
    """
    limit = _limit(sample, max_tokens)
    if not 0 <= free_tokens < limit:
        raise UserError(f"reward length: free_tokens is {free_tokens}; give 0 to {limit - 1}, below the length limit")
    return 0.0 - min(max((sample.completion_tokens - free_tokens) / (limit - free_tokens), 0.0), 1.0)


def repetition(sample: Sample, *, ngram_size: int = 3, max_penalty: float = -1.0) -> float:
    """``max_penalty`` times the share of repeated word n-grams (2502.03373): 0 where all differ or none fits.

    share = 1 - distinct/total over the lower-cased, white-space separated words of the completion.
    Raises UserError for ngram_size < 1 or max_penalty > 0.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise UserError(f"reward repetition: ngram_size {ngram_size} must be >= 1 and max_penalty {max_penalty} <= 0")
    words = sample.completion.lower().split()
    total = len(words) - ngram_size + 1
    if total < 1:
        return 0.0
    distinct = len({tuple(words[i : i + ngram_size]) for i in range(total)})
    return max_penalty * (1 - distinct / total)


def _limit(sample: Sample, max_tokens: int | None) -> int:
    limit = sample.max_completion_tokens if max_tokens is None else max_tokens
    if limit < 1:
        raise UserError(f"reward option max_tokens is {limit}; it must be positive")
    return limit
