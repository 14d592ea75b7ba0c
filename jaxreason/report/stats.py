"""The few statistics of a comparison: a mean with its interval over seeds, paired differences, a trailing mean."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import ndtri, stdtrit

_LEVEL = 0.05  # how often a claim may be wrong, or any of several that are made together


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; ``low`` and ``high`` are None where a single value leaves it unknown."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_factor(count: int, claims: int = 1) -> float:
    """Half-width of a 95 % interval in standard errors: the 0.975 quantile of Student's t, count − 1 degrees.

    ``claims``: intervals that are read together. Each is then one of 1 − 0.05 / claims, so that all of them hold with a
    probability of 95 % at least (Bonferroni).
    """
    return float(stdtrit(count - 1, 1 - _LEVEL / claims / 2))


def estimate(values: Sequence[float], claims: int = 1) -> Estimate:
    """mean ± t · s / √n with s of ddof 1: exact for normal values however few, and therefore wide for few."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, None, count)
    half = t_factor(count, claims) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Rate:
    """A share of right answers, and to how many problems."""

    value: float
    trials: float | None  # None: not recorded

    @property
    def variance(self) -> float:
        """Of the share, over other problems of the same kind; NaN where their number is not known.

        Two right and two wrong answers more than there were keep it from being zero (Agresti and Coull 1998).
        """
        if self.trials is None:
            return math.nan
        p = (self.value * self.trials + 2) / (self.trials + 4)
        return p * (1 - p) / (self.trials + 4)


def accuracy(rates: Sequence[Rate]) -> Estimate:
    """Mean over seeds, with an interval for other seeds and other problems: the squares of both half-widths add.

    Over seeds it is :func:`estimate`; over problems, which are the same for every seed, 1.96 binomial standard errors.
    """
    return _wider(estimate([rate.value for rate in rates]), statistics.fmean(rate.variance for rate in rates))


def accuracy_difference(rates: Mapping[int, Rate], base: Mapping[int, Rate], claims: int = 1) -> Estimate | None:
    """Mean of ``rates − base`` over seeds that both have on equally many problems, None if there is none.

    Both sides of a seed saw the same prompts in the same order, which takes that part of the noise away. The interval is for
    other seeds and other problems. The variance over problems is that of two independent sets, more than that of one set whose
    answers mostly agree: how often they do is not recorded. ``claims``: differences that are read together
    (:func:`t_factor`).
    """
    shared = sorted(seed for seed in rates.keys() & base.keys() if rates[seed].trials == base[seed].trials)
    if not shared:
        return None
    pairs = [(rates[seed], base[seed]) for seed in shared]
    over_seeds = estimate([a.value - b.value for a, b in pairs], claims)
    return _wider(over_seeds, statistics.fmean(a.variance + b.variance for a, b in pairs), claims)


def _wider(found: Estimate, variance: float, claims: int = 1) -> Estimate:
    """With the error over problems in its interval; without an interval where either error is unknown."""
    if found.low is None or found.high is None or math.isnan(variance):
        return Estimate(found.mean, None, None, found.count)
    half = math.hypot((found.high - found.low) / 2, float(ndtri(1 - _LEVEL / claims / 2)) * math.sqrt(variance))
    return Estimate(found.mean, found.mean - half, found.mean + half, found.count)


def trailing_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """At each place the mean of the last ``window`` values, gaps (None) left out; a gap stays a gap."""
    smooth = []
    for i, value in enumerate(values):
        known = [v for v in values[max(0, i - window + 1) : i + 1] if v is not None]
        smooth.append(None if value is None else statistics.fmean(known))
    return smooth
