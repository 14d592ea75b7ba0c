"""How sure a measured accuracy is: intervals over problems, pass@k, votes, and paired differences.

Axes: P problems, K samples of each. Every interval is one of 95 % for other problems of the same kind; samples of one
problem are not independent of each other, so a problem is the unit.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np
from scipy import special, stats

LEVEL = 0.95
Z = float(special.ndtri((1 + LEVEL) / 2))  # 1.96
_RESAMPLES = 2_000
_ELEMENTS = 2_000_000  # of resamples that exist at once: the correction alone would need P² of them

Vote = TypeVar("Vote", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def percent(self) -> str:
        """``42.0 % [38.1, 46.0]``."""
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(successes: float, trials: float, z: float = Z) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927): honest at 0 %, at 100 % and for few trials. Trials need not be whole.

    ``z``: half-width of the interval in standard errors.
    """
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    centre, spread = p + z * z / (2 * trials), z * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, float(centre - spread) / scale), min(1.0, float(centre + spread) / scale)


def clustered(right_P_K: np.ndarray) -> Interval:
    """The mean over problems of the mean over samples (pass@1, avg@k), each problem a cluster.

    Wilson's interval of as many independent answers as would have the same variance, n = p (1 − p) / (s² / P), where s² is
    the variance (ddof 1) of the problems' means; since it is estimated, with Student's quantile in place of the normal one.
    n is at least P and at most P · K. One sample a problem is Wilson's own interval; so are problems that are all right or
    all wrong, where nothing tells how alike the samples are.
    """
    means = right_P_K.mean(axis=1) if right_P_K.size else np.zeros(0)
    return _mean_of(means, right_P_K.size)


def _mean_of(values_P: np.ndarray, most: int) -> Interval:
    """The same of one value in [0, 1] a problem; ``most``: independent answers that they can be worth at most."""
    count = len(values_P)
    if not count:
        return Interval(0.0, 0.0, 1.0)
    p, variance = float(values_P.mean()), float(values_P.var(ddof=1)) if count > 1 else 0.0
    worth = p * (1 - p) * count / variance if variance > 0 else (most if 0 < p < 1 and count > 1 else count)
    worth = min(max(worth, count), max(most, count))
    return Interval(p, *wilson(p * worth, worth, float(special.stdtrit(count - 1, (1 + LEVEL) / 2)) if worth > count else Z))


def pass_at_k(right_P_K: np.ndarray, k: int) -> Interval:
    """How often at least one of ``k`` samples is right: the unbiased 1 − C(n − c, k) / C(n, k) of each problem
    (arXiv 2107.03374), n samples of which c are right, and its mean. Raises ValueError for k > n."""
    n = right_P_K.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs between 1 and {n} samples")
    wrong = n - right_P_K.sum(axis=1)
    missed = np.ones(len(wrong))
    for i in range(k):  # C(n − c, k) / C(n, k) = Π (n − c − i) / (n − i), without large numbers
        missed *= np.maximum(wrong - i, 0) / (n - i)
    return _mean_of(1 - missed, right_P_K.size // k)


def vote(answers: Sequence[Vote | None]) -> list[Vote]:
    """The answers given most often, in order of appearance; those that are None have no vote."""
    counts: dict[Vote, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    most = max(counts.values(), default=0)
    return [answer for answer, count in counts.items() if count == most]


def consensus(answers_P_K: Sequence[Sequence[Hashable | None]], right_P_K: np.ndarray) -> Interval:
    """cons@K: whether the answer that most samples give is right (arXiv 2203.11171).

    A tie counts by the share of its answers that are right, which is what drawing one of them gives on average.
    """
    values = []
    for answers, right in zip(answers_P_K, right_P_K):
        won = vote(answers)
        scores = [np.mean([r for a, r in zip(answers, right) if a == answer]) for answer in won]
        values.append(float(np.mean(scores)) if scores else 0.0)
    return _mean_of(np.array(values), len(values))


def paired(a_P: np.ndarray, b_P: np.ndarray, seed: int = 0) -> Interval:
    """Mean of ``a − b`` over problems that both answered, with scipy's bootstrap over problems (bias-corrected).

    Where every difference is the same, resampling shows no spread: the interval then reaches as far as a difference that
    was seen on none of P problems may still be common, by Wilson.
    """
    difference = np.asarray(a_P, float) - np.asarray(b_P, float)
    count = len(difference)
    if not count:
        return Interval(0.0, -1.0, 1.0)
    mean = float(difference.mean())
    if np.ptp(difference) == 0:
        unseen = wilson(0, count)[1]
        return Interval(mean, max(-1.0, mean - unseen), min(1.0, mean + unseen))
    found = stats.bootstrap(
        (difference,), np.mean, n_resamples=_RESAMPLES, confidence_level=LEVEL, method="BCa", vectorized=True,
        batch=max(1, _ELEMENTS // count), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(mean, float(found.low), float(found.high))
