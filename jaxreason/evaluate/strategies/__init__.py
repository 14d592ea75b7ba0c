"""Ways to get an answer out of a model, by name: ``STRATEGIES`` is all of them.

A strategy is a generator function ``(query, *, options) -> Search`` (``jaxreason.evaluate.ask``). One of your own is
``package.module:function`` or ``path/file.py:function``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

from jaxreason import plugins
from jaxreason.config.text import read_yaml
from jaxreason.errors import UserError
from jaxreason.evaluate.ask import Query, Search
from jaxreason.evaluate.strategies import budget, sampled, tree

__all__ = ["STRATEGIES", "Strategy", "get"]

STRATEGIES: dict[str, Callable[..., Search]] = {
    "direct": sampled.once,
    "cot": sampled.once,
    "self_consistency": sampled.self_consistency,
    "best_of_n": sampled.best_of_n,
    "budget": budget.budget,
    "tot_bfs": tree.bfs,
    "tot_dfs": tree.dfs,
}


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A strategy with its options."""

    word: str  # as it was asked for
    name: str
    options: dict[str, Any]  # every one, defaults included
    search: Callable[[Query], Search]

    @property
    def protocol(self) -> Literal["direct", "cot"] | None:
        """How a task with several ways of asking is asked, where the strategy's name says it."""
        return "direct" if self.name == "direct" else "cot" if self.name == "cot" else None

    @property
    def single(self) -> bool:
        """Whether it is one draw, of which several samples may be asked for."""
        return STRATEGIES.get(self.name) is sampled.once


def get(word: str) -> Strategy:
    """What ``NAME`` or ``NAME@option=value@option=value`` means. Raises UserError for an unknown name or option."""
    name, *rest = word.split("@")
    values: dict[str, Any] = {}
    for part in rest:
        key, equals, text = part.partition("=")
        if not equals:
            raise UserError(f"--strategy {word}: {part!r} is not option=value, e.g. self_consistency@k=16")
        values[key] = read_yaml(text, f"--strategy {word}")
    if name not in STRATEGIES and ":" not in name:
        raise UserError(
            f"--strategy {name} is unknown{plugins.nearest(name, STRATEGIES)}; known: {', '.join(STRATEGIES)}, or "
            "package.module:function, or path/file.py:function"
        )
    function = STRATEGIES[name] if name in STRATEGIES else plugins.load(name, "--strategy")
    checked = plugins.check_options(function, values, f"--strategy {name}")
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}
    return Strategy(word, name, defaults | checked, functools.partial(function, **checked))
