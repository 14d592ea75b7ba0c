"""Several sources as one: which rows of each an epoch holds, and their stores end to end."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from jaxreason.config import Portion, Problems
from jaxreason.data.sources import parts
from jaxreason.data.store import Store, Tokens
from jaxreason.errors import UserError

_STREAM = 2**32 - 2  # no epoch's number, so that no source's order is an epoch's


def portions(data: Problems) -> list[Portion]:
    """``data.source`` with weight 1, then ``data.mixture``. Raises UserError where two of them share rows."""
    own = Portion(source=data.source, split=data.split, row_schema=data.row_schema, max_rows=data.max_rows)
    found, seen = [own, *data.mixture], dict[str, str]()
    for portion in found if data.mixture else []:
        for part in parts(portion.source, portion.split):
            if part in seen:
                raise UserError(
                    f"data.mixture: {part} is in {seen[part]} and in {portion.source}; name it once, with a weight that says how "
                    "often it is used"
                )
            seen[part] = portion.source
    return found


@dataclasses.dataclass(frozen=True)
class Shares:
    """Which rows an epoch holds, of sources that stand end to end.

    Of a source of n rows and weight w an epoch holds k = max(1, round(w·n)). Epoch e takes rows e·k … (e+1)·k - 1 of an endless
    stream of passes over the source, so that over the epochs all its rows come equally often, whatever w is. With ``shuffle``
    each pass has an order of its own, ``numpy.random.default_rng([seed, stream, source, pass])``.
    """

    sizes: tuple[int, ...]  # n of each source
    weights: tuple[float, ...]
    seed: int
    shuffle: bool

    @property
    def counts(self) -> tuple[int, ...]:
        """k of each source; a source without rows has none."""
        return tuple(max(1, round(w * n)) if n else 0 for n, w in zip(self.sizes, self.weights))

    def __len__(self) -> int:
        return sum(self.counts)

    def epoch(self, number: int) -> np.ndarray:
        """Positions [len(self)] int64 of the rows of epoch ``number``, source by source."""
        firsts = np.cumsum((0, *self.sizes[:-1]))
        return np.concatenate([first + self._of(source, number) for source, first in enumerate(firsts)])

    def _of(self, source: int, epoch: int) -> np.ndarray:
        size, count = self.sizes[source], self.counts[source]
        if count == size:  # every row once; what follows puts them in order
            return np.arange(size)
        passes, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), size)
        if not self.shuffle:
            return places
        orders = {n: np.random.default_rng([self.seed, _STREAM, source, n]).permutation(size) for n in set(passes.tolist())}
        return np.array([orders[n][place] for n, place in zip(passes.tolist(), places.tolist())], np.int64)


@dataclasses.dataclass(frozen=True)
class _Joined:
    """The tokens of stores end to end; no slice crosses from one store into the next."""

    parts: Sequence[Tokens]
    firsts: np.ndarray  # [stores] the place of each one's first token

    def __getitem__(self, part: slice) -> np.ndarray:
        at = int(np.searchsorted(self.firsts, part.start, side="right")) - 1
        first = int(self.firsts[at])
        return self.parts[at][int(part.start) - first : int(part.stop) - first]


def joined(stores: Sequence[Store]) -> Store:
    """The stores end to end as one; a single store is returned as it is."""
    if len(stores) == 1:
        return stores[0]
    firsts = np.cumsum([0, *(int(store.offsets[-1]) for store in stores)])
    offsets = np.concatenate([store.offsets[:-1] + first for store, first in zip(stores, firsts)] + [firsts[-1:]])
    starts, answers, rows = (np.concatenate([getattr(s, name) for s in stores]) for name in ("starts", "answers", "rows"))
    content = hashlib.sha256("".join(store.meta["content"] for store in stores).encode()).hexdigest()
    return Store(_Joined([s.tokens for s in stores], firsts[:-1]), offsets, starts, answers, rows, {"content": content})
