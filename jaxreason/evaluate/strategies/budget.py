"""Budget forcing (arXiv 2501.19393): a thought that ends too early goes on, one that lasts too long is ended."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from jaxreason.evaluate.ask import Ask, Final, Query, Search, Turn
from jaxreason.text import THINK_CLOSE, THINK_OPEN

Tokens = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


def budget(
    query: Query, *, min_tokens: Tokens = 0, max_tokens: Positive = 512, answer_tokens: Positive = 128, waits: Tokens = 8,
    wait: str = "Wait", end: str | None = None,
) -> Search:  # fmt: skip
    r"""Thinks for at least ``min_tokens`` and at most ``max_tokens``, then answers within ``answer_tokens``.

    A thought ends with ``</think>``, or with the turn where the model uses no such tag. One that ends below the minimum is cut
    there and goes on after ``wait``, at most ``waits`` times. One that reaches the maximum is cut, and ``end`` (null:
    ``</think>`` where a thought is open, and "The answer is" where there is none) begins the answer.
    """
    drawing = dataclasses.replace(query.sampling, max_completion_tokens=max_tokens)
    begun: list[int | str] = []
    spent = waited = 0
    tagged = query.opened
    while True:
        (reply,) = (yield Ask((Turn(query.example, tuple(begun)),), drawing))[0]
        tagged = tagged or THINK_OPEN in reply.text
        closed = THINK_CLOSE in reply.text
        ended = closed or not reply.truncated
        thought = before(query, reply.tokens, THINK_CLOSE) if closed else len(reply.tokens)
        if spent + thought >= max_tokens:  # drawn in one piece, its thought may be longer than what is left
            begun += reply.tokens[: max_tokens - spent]
            spent = max_tokens
            break
        spent += thought
        if spent < min_tokens and waited < waits and ended:
            begun += [*reply.tokens[:thought], f"\n{wait}"]
            waited += 1
            continue
        begun += reply.tokens
        if not reply.truncated and (closed or not tagged):
            return (Final(_text(query, begun), details={"thinking_tokens": spent, "waits": waited}),)
        break  # the answer is not finished, or the turn ended inside of its thought
    forced = THINK_CLOSE not in _text(query, begun)
    if forced:
        begun.append(end if end is not None else f"\n{THINK_CLOSE}\n\n" if tagged else "\nThe answer is")
    answering = dataclasses.replace(query.sampling, max_completion_tokens=answer_tokens)
    (reply,) = (yield Ask((Turn(query.example, tuple(begun)),), answering))[0]
    begun += reply.tokens
    details = {"thinking_tokens": spent, "waits": waited, "ended": forced}
    return (Final(_text(query, begun), reply.truncated, details=details),)


def _text(query: Query, parts: Sequence[int | str]) -> str:
    """Tokens and texts as one text; tokens that follow each other are decoded together."""
    text, run = "", list[int]()
    for part in (*parts, ""):
        if isinstance(part, str):
            text += (query.decode(run) if run else "") + part
            run = []
        else:
            run.append(part)
    return text


def before(query: Query, tokens: Sequence[int], mark: str) -> int:
    """How many first tokens end before ``mark`` begins in the text of all: the longest such prefix."""
    at = query.decode(tokens).index(mark)
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(query.decode(tokens[:middle])) <= at else (low, middle - 1)
    return low
