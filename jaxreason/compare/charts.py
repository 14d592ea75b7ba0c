"""Line charts as inline SVG: a mean line and a band from the lowest to the highest seed for each loss."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 24
COLOURS = 8  # as many as report.css tells apart; further lines repeat them dashed


@dataclass(frozen=True)
class Line:
    """One loss in one chart; values are None at gaps."""

    index: int  # of the loss, which is its colour in every chart
    label: str
    steps: list[int]
    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]


def short(value: float | None) -> str:
    """Three significant digits; an en dash for what is unknown."""
    if value is None:
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if size >= 1e-3 else f"{value:.1e}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about ``count`` of them, within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def extent(lines: Sequence[Line]) -> tuple[float, float]:
    """Bottom and top of the y axis: from 0 where the values come near it, with a little air."""
    known = [v for line in lines for side in (line.low, line.high) for v in side if v is not None]
    low, high = min(known), max(known)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        return low - pad, high + pad
    if 0 <= low < 0.4 * high:
        return 0.0, high + 0.04 * high
    pad = 0.06 * (high - low)
    return low - pad, high + pad


def chart(title: str, lines: Sequence[Line], points: bool) -> Markup:
    """The SVG of one metric; ``points`` marks every value, for metrics that are known at few steps only."""
    bottom, top = extent(lines)
    steps = [step for line in lines for step in line.steps]
    first, last = min(steps), max(steps)
    span = max(1, last - first)

    def x(step: float) -> float:
        return round(_LEFT + (step - first) / span * (WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_TOP + (top - value) / (top - bottom) * (HEIGHT - _TOP - _BOTTOM), 1)

    grid = Markup("").join(
        Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="y" x="{}" y="{}">{}</text>').format(
            _LEFT, WIDTH - _RIGHT, y(tick), y(tick), _LEFT - 6, y(tick) + 3.5, f"{tick:,.6g}"
        )
        for tick in ticks(bottom, top)
    )
    marks = sorted({round(tick) for tick in ticks(first, max(last, first + 1), 5)} & set(range(first, last + 1)))
    axis = Markup("").join(
        Markup('<text class="x" x="{}" y="{}">{}</text>').format(x(tick), HEIGHT - 7, f"{tick:,}") for tick in marks
    )
    drawn = Markup("").join(_line(line, x, y, points) for line in lines)
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-x="{}">{}{}{}<line class="cursor" y1="{}" y2="{}"/></svg>'
    ).format(
        WIDTH, HEIGHT, title, json.dumps([first, span, _LEFT, WIDTH - _LEFT - _RIGHT]), grid, axis, drawn, _TOP,
        HEIGHT - _BOTTOM,
    )  # fmt: skip


def _line(line: Line, x: Callable[[float], float], y: Callable[[float], float], points: bool) -> Markup:
    """Band, mean and the values that the reader's cursor asks for."""
    pieces = []
    band = [(s, a, b) for s, a, b in zip(line.steps, line.low, line.high) if a is not None and b is not None]
    if any(a != b for _, a, b in band):
        outline = [(x(s), y(b)) for s, _, b in band] + [(x(s), y(a)) for s, a, _ in reversed(band)]
        pieces.append(Markup('<polygon class="band" points="{}"/>').format(_points(outline)))
    for run in _unbroken(line):
        pieces.append(Markup('<polyline class="mean" points="{}"/>').format(_points([(x(s), y(v)) for s, v in run])))
        if points or len(run) == 1:
            pieces += [Markup('<circle cx="{}" cy="{}" r="2.5"/>').format(x(s), y(v)) for s, v in run]
    values = [
        [s, short(m), short(a), short(b)]
        for s, m, a, b in zip(line.steps, line.mean, line.low, line.high)
        if m is not None
    ]
    return Markup('<g class="loss c{}{} s{}" data-index="{}" data-label="{}" data-values="{}">{}</g>').format(
        line.index % COLOURS, " dashed" if line.index >= COLOURS else "", line.index, line.index, line.label,
        json.dumps(values, separators=(",", ":"), ensure_ascii=False), Markup("").join(pieces),
    )  # fmt: skip


def _unbroken(line: Line) -> list[list[tuple[int, float]]]:
    """The line's points, cut at gaps."""
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in zip(line.steps, line.mean):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in places)
