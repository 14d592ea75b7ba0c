"""The few statistics of a comparison: a mean with its interval over seeds, paired differences, a trailing mean."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit


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


def t_factor(count: int) -> float:
    """Half-width of a 95 % interval in standard errors: the 0.975 quantile of Student's t, count − 1 degrees."""
    return float(stdtrit(count - 1, 0.975))


def estimate(values: Sequence[float]) -> Estimate:
    """mean ± t · s / √n with s of ddof 1: exact for normal values however few, and therefore wide for few."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, None, count)
    half = t_factor(count) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Estimate | None:
    """Mean of ``values − base`` over the seeds that both have, None if there is none.

    Both sides of a difference saw the same prompts in the same order, which takes that part of the noise away.
    """
    shared = sorted(values.keys() & base.keys())
    return estimate([values[seed] - base[seed] for seed in shared]) if shared else None


def trailing_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """At each place the mean of the last ``window`` values, gaps (None) left out; a gap stays a gap."""
    smooth = []
    for i, value in enumerate(values):
        known = [v for v in values[max(0, i - window + 1) : i + 1] if v is not None]
        smooth.append(None if value is None else statistics.fmean(known))
    return smooth
