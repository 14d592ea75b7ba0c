"""What a figure shows, apart from how it is drawn: :mod:`charts` makes SVG of it and :mod:`plots` PNG and PDF."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """One series of a chart; values are None at gaps."""

    index: int  # of the series, which is its colour in every figure
    label: str
    steps: Sequence[float]
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]

    @classmethod
    def plain(cls, index: int, label: str, steps: Sequence[float], values: list[float | None]) -> "Line":
        """A line without a band."""
        return cls(index, label, steps, values, values, values)


@dataclass(frozen=True)
class Dots:
    """Single points (x, y) of one series."""

    index: int
    label: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines, or dots, over a common axis. Its lines have a value, or there are dots."""

    name: str  # of its files: letters, digits, _ and -
    title: str
    note: str  # a sentence that says what is seen
    lines: Sequence[Line] = ()
    dots: Sequence[Dots] = ()
    marked: bool = False  # every value, for metrics that are known at few steps only
    axis: str = "step"
    nested: bool = False  # lines may coincide: earlier ones are drawn thicker
    metric: str = ""  # the name in metrics.jsonl, where it is one of these


@dataclass(frozen=True)
class Bars:
    """One bar for each series; None: not known."""

    name: str
    title: str
    note: str
    indices: Sequence[int]  # of the series, as of lines
    labels: Sequence[str]
    values: Sequence[float | None]
    counts: bool = False  # whole numbers
    metric: str = field(default="", init=False)


@dataclass(frozen=True)
class Heat:
    """A square of values in [-1, 1]; None: undefined."""

    name: str
    title: str
    note: str
    labels: Sequence[str]
    values: Sequence[Sequence[float | None]]
    metric: str = field(default="", init=False)


Figure = Chart | Bars | Heat


def extent(chart: Chart) -> tuple[float, float]:
    """Bottom and top of the y axis: from 0 where the values come near it, with a little air."""
    known = [v for line in chart.lines for side in (line.low, line.high) for v in side if v is not None]
    known += [y for dots in chart.dots for _, y in dots.points]
    low, high = min(known), max(known)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    if 0 <= low < 0.4 * high:
        return 0.0, high + 0.04 * high
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def width(chart: Chart) -> tuple[float, float]:
    """First and last place of the x axis."""
    places = [step for line in chart.lines for step in line.steps] + [x for dots in chart.dots for x, _ in dots.points]
    return min(places), max(places)
