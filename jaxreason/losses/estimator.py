"""An advantage estimator with its options bound, and the checks on what one of the user's own returns."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason import plugins
from jaxreason.errors import UserError

GIVEN = ("lengths_P_G", "rewards_F_P_G", "weights_F", "sequences_P_G", "greedy_P", "expert_P_G")
"""What an estimator may ask for, by the name of a parameter, in addition to ``rewards_P_G``, its first."""

PerToken = list[list[np.ndarray]]  # [P][G], each [n] float32


def estimator(*, fills: Iterable[str] = ()) -> Callable[[Callable], Callable]:
    """Declares a function of your own as an advantage estimator that ``fills`` extras; see :class:`Estimator`."""

    def declare(function: Callable) -> Callable:
        return plugins.mark(function, fills=tuple(fills))

    return declare


@dataclasses.dataclass(frozen=True, eq=False)
class Estimator:
    """``advantages, extras = estimator(rewards_P_G, **given)``.

    The function takes ``rewards_P_G`` [P, G] (NaN: no reward), its options, and by the names of its parameters what it
    ``reads``: ``lengths_P_G`` (completion tokens), ``rewards_F_P_G`` (each reward function's) with ``weights_F``,
    ``sequences_P_G`` (nested lists of records with ``tokens``, ``text``, ``reward``, ``rewards``, ``prompt``, ``extras``),
    ``greedy_P`` (the reward of each prompt's greedy completion, which is then drawn in addition; NaN: none), ``expert_P_G``
    (True: the row's own answer; an estimator that does not ask for it does not see these answers either).
    It returns advantages, or (advantages, extras) where it fills extras.

    Advantages: [P, G], or nested lists [P][G] of a number, or of an array [n] with one for every token. Extras: by name,
    nested lists [P][G] of arrays [n].
    """

    name: str
    options: Mapping[str, Any]
    function: Callable = dataclasses.field(repr=False)

    @property
    def reads(self) -> frozenset[str]:
        """Which of ``GIVEN`` the function takes."""
        return frozenset(GIVEN) & frozenset(plugins.declared_options(self.function))

    @property
    def needs(self) -> frozenset[str]:
        """The extras of the sequences that it reads, which a reward or a hook has to fill."""
        return frozenset(getattr(self.function, "needs", ()))

    @property
    def by_group(self) -> bool:
        """Whether it judges each group by itself, so that a process can do so for its own groups."""
        return bool(getattr(self.function, "by_group", False))

    @property
    def fills(self) -> frozenset[str]:
        """The extras that it fills, by name."""
        return frozenset(getattr(self.function, "fills", ()))

    def __call__(self, rewards_P_G: Any, **given: Any) -> tuple[Any, dict[str, PerToken]]:
        """Advantages and extras, of the kinds above.

        ``given`` may hold more than what it reads. With ``lengths_P_G`` or ``sequences_P_G`` among it, the numbers of
        tokens are checked, too. An advantage of a sample without a reward is 0.

        Raises UserError, naming the estimator, for advantages or extras of other shapes, that are not finite, or undeclared.
        """
        unknown = set(given) - set(GIVEN)
        if unknown:
            raise TypeError(f"an estimator is given {', '.join(GIVEN)}, not {', '.join(sorted(unknown))}")
        found = self.function(rewards_P_G, **{name: given[name] for name in self.reads}, **self.options)
        if ":" not in self.name:
            return found, {}
        advantages, extras = found if self._is_pair(found) else (found, {})
        if set(extras) != self.fills:
            raise self._error(f"declares fills={sorted(self.fills)} but returned extras {sorted(extras)}")
        rewards = np.asarray(rewards_P_G, np.float32)
        lengths = _lengths(rewards, given)
        advantages = self._table(advantages, lengths, "advantages", scalars=True)
        # What is no reward teaches nothing, whatever came out of its NaN.
        advantages = [
            [value if there else np.zeros_like(value) for value, there in zip(row, graded)]
            for row, graded in zip(advantages, ~np.isnan(rewards))
        ]
        tables = {name: self._table(values, lengths, f"extras[{name!r}]", scalars=False) for name, values in extras.items()}
        for what, table in {"advantages": advantages, **{f"extras[{name!r}]": x for name, x in tables.items()}}.items():
            self._check_finite(table, what)
        return [[value if value.ndim else float(value) for value in row] for row in advantages], tables

    def _error(self, what: str) -> UserError:
        return UserError(f"advantage.name {self.name}: {what}")

    @staticmethod
    def _is_pair(found: Any) -> bool:
        return isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)

    def _table(self, values: Any, lengths: list[list[int | None]], what: str, scalars: bool) -> list[list[Any]]:
        """[P][G] of float32 scalars or arrays [n], from what the function returned."""
        shape = f"[{len(lengths)}][{len(lengths[0]) if lengths else 0}]"
        try:
            table = [[np.asarray(value, np.float32) for value in row] for row in values]
        except (TypeError, ValueError) as error:
            raise self._error(f"{what} must be nested lists {shape} of {'numbers or ' * scalars}arrays [n]: {error}") from None
        sizes, wanted = [len(row) for row in table], [len(row) for row in lengths]
        if sizes != wanted:
            raise self._error(f"{what} hold groups of {sizes} samples, but the rewards have {wanted}")
        for p, row in enumerate(table):
            for g, value in enumerate(row):
                n = lengths[p][g]
                if not (scalars and value.ndim == 0) and (value.ndim != 1 or n not in (None, len(value))):
                    of = f"its {n} tokens" if n is not None else "tokens"
                    raise self._error(f"{what}[{p}][{g}] has shape {value.shape}; one number for each of {of} is expected")
        return table

    def _check_finite(self, table: Sequence[Sequence[np.ndarray]], what: str) -> None:
        for p, row in enumerate(table):
            for g, value in enumerate(row):
                if not np.all(np.isfinite(value)):
                    raise self._error(f"{what}[{p}][{g}] is {value}; finite numbers are expected")


def _lengths(rewards: np.ndarray, given: Mapping[str, Any]) -> list[list[int | None]]:
    """[P][G] completion tokens of every sample, None where nothing tells."""
    if "sequences_P_G" in given:
        return [[len(sequence.tokens) for sequence in group] for group in given["sequences_P_G"]]
    if "lengths_P_G" in given:
        return [[None if np.isnan(n) else int(n) for n in row] for row in np.asarray(given["lengths_P_G"], np.float64)]
    return [[None] * rewards.shape[1] for _ in rewards]
