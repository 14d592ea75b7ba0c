"""Answers drawn independently: one, the most frequent, or the best by a score."""

import dataclasses
import math
from typing import Annotated

from pydantic import Field

from jaxreason.errors import UserError
from jaxreason.evaluate.ask import Ask, Final, Query, Reply, Search, Turn
from jaxreason.evaluate.estimates import vote
from jaxreason.sampler import Sampling

Count = Annotated[int, Field(ge=1)]
Heat = Annotated[float, Field(ge=0)]


def final(reply: Reply, **details: object) -> Final:
    return Final(reply.text, reply.truncated, reply.tokens, dict(details))


def warm(sampling: Sampling, temperature: float | None) -> Sampling:
    """``sampling`` at a temperature of the strategy's own; None: the run's, or 0.7 where that is greedy."""
    if temperature is None:
        temperature = sampling.temperature or 0.7
    return dataclasses.replace(sampling, temperature=temperature)


def once(query: Query) -> Search:
    """One draw: of the answer alone (``direct``), or of a chain of thought before it (``cot``), as the task is asked."""
    replies = yield Ask((Turn(query.example),), query.sampling, query.samples)
    return tuple(final(reply) for reply in replies[0])


def self_consistency(query: Query, *, k: Count = 16, temperature: Heat | None = None) -> Search:
    """The answer that most of ``k`` chains of thought give (arXiv 2203.11171); of equals the one that came first.

    Its text is the first chain that gives it. ``details``: the share of votes, which is a signal of confidence.
    """
    replies = yield Ask((Turn(query.example),), warm(query.sampling, temperature), k)
    answers = [query.answer(reply.text) for reply in replies[0]]
    won = vote(answers)
    best = answers.index(won[0]) if won else 0
    share = answers.count(won[0]) / k if won else 0.0
    return (final(replies[0][best], answers=answers, share=share),)


def best_of_n(query: Query, *, n: Count = 16, scorer: str = "logp", temperature: Heat | None = None) -> Search:
    """The best of ``n`` answers by a score that does not know the right one; of equals the one that came first.

    Args:
      scorer: ``logp``, the mean log-prob of a token; ``format`` or another reward that needs no gold; or a function of your
        own, ``path/file.py:function``, such as a reward model. It runs in processes with a time limit, as rewards do.
    """
    replies = yield Ask((Turn(query.example),), warm(query.sampling, temperature), n)
    if scorer == "logp":
        scores = [reply.logp / reply.drawn for reply in replies[0]]
    else:
        scores = query.rate(scorer, [reply.text for reply in replies[0]])
    if len(scores) != n:
        raise UserError(f"best_of_n: {scorer} gave {len(scores)} scores of {n}")
    best = scores.index(max(scores))
    return (final(replies[0][best], scores=[score if math.isfinite(score) else None for score in scores]),)
