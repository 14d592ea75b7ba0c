"""Figures as inline SVG. Its classes are coloured by page.css, so that a figure follows the page's light or dark."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources

from markupsafe import Markup

from jaxreason.report.figures import Bars, Chart, Dots, Figure, Heat, Line, extent, width

WIDTH, HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 8, 8, 24
_ROW = 26  # height of a bar
COLOURS = 8  # as many as page.css tells apart; further series repeat them dashed


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


def svg(figure: Figure) -> Markup:
    """The SVG of a figure."""
    if isinstance(figure, Chart):
        return _chart(figure)
    return _bars(figure) if isinstance(figure, Bars) else _heat(figure)


def standalone(figure: Figure) -> str:
    """An SVG file: the figure with its title, the names of its series and the colours of a light page."""
    drawn = svg(figure)
    height = float(drawn.partition('viewBox="0 0 ')[2].partition('"')[0].split()[1])
    series: dict[int, str] = {}
    if isinstance(figure, Chart):
        series = {line.index: line.label for line in figure.lines} | {dots.index: dots.label for dots in figure.dots}
    legend = Markup("").join(
        Markup('<g class="{}"><line class="mean" x1="{}" x2="{}" y1="{}" y2="{}"/><text x="{}" y="{}">{}</text></g>').format(
            _classes(index), _LEFT, _LEFT + 18, y, y, _LEFT + 26, y + 4, label
        )
        for y, (index, label) in zip((round(height + 38 + 16 * i, 1) for i in range(len(series))), series.items())
    )
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}"><style>{}</style>'
        '<rect width="100%" height="100%" fill="#fff"/><text class="title" x="8" y="16">{}</text>'
        '<svg y="24" width="{}" height="{}" {}{}</svg>'
    ).format(
        WIDTH, round(height + 40 + 16 * len(series), 1), WIDTH, Markup(_plain_style()), figure.title, WIDTH, height,
        Markup(drawn.partition("<svg ")[2]), legend,
    )  # fmt: skip


def _plain_style() -> str:
    """page.css's rules for figures with the colours of a light page in place of variables, which few SVG readers know."""
    text = (resources.files(__package__) / "page.css").read_text()
    light, rules = text.partition("@media")[0], text.partition("/* figures */")[2].partition("/* end */")[0]
    names = dict(re.findall(r"--(page|ink|soft|rule|panel): (#\w+)", light))
    colours = re.findall(r"\.(c\d) { --c: (#\w+)", light)
    lines = []
    for selectors, body in re.findall(r"(.+?) {(.+?)}", rules):
        of_series = [(f"{name} ", colour) for name, colour in colours] if "var(--c)" in body else [("", "")]
        for name, colour in of_series:
            prefix = f".{name}" if name else ""
            full = ", ".join(prefix + selector for selector in selectors.split(", "))
            lines.append(f"{full} {{{_without_variables(body, names | {'c': colour})}}}")
    return "\n".join(lines)


def _without_variables(rules: str, values: Mapping[str, str]) -> str:
    return re.sub(r"var\(--(\w+)\)", lambda found: values[found[1]], rules)


def _classes(index: int) -> str:
    return f"c{index % COLOURS}{' dashed' if index >= COLOURS else ''} s{index}"


def _frame(height: float, title: str, *parts: Markup, data: Markup | str = "") -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"{}>{}</svg>').format(
        WIDTH, round(height, 1), title, data, Markup("").join(parts)
    )


# ---- lines and dots


def _chart(chart: Chart) -> Markup:
    bottom, top = extent(chart)
    first, last = width(chart)
    stepwise = chart.axis == "step"
    span = max(1, last - first) if stepwise else (last - first or 1.0)

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
    marks: Sequence[float] = ticks(first, first + span, 5)
    if stepwise:
        marks = sorted({round(tick) for tick in marks} & set(range(int(first), int(last) + 1)))
    axis = Markup("").join(
        Markup('<text class="x" x="{}" y="{}">{}</text>').format(x(tick), HEIGHT - 7, f"{tick:,.6g}") for tick in marks
    )
    drawn = [_line(line, x, y, chart.marked, thick) for line, thick in zip(chart.lines, thickness(chart))]
    drawn += [_dots(dots, x, y) for dots in chart.dots]
    cursor = Markup('<line class="cursor" y1="{}" y2="{}"/>').format(_TOP, HEIGHT - _BOTTOM)
    where = json.dumps([first, span, _LEFT, WIDTH - _LEFT - _RIGHT])
    data = Markup(' data-x="{}" data-axis="{}"').format(where, chart.axis) if chart.lines else ""
    return _frame(HEIGHT, chart.title, grid, axis, *drawn, cursor, data=data)


def thickness(chart: Chart) -> list[int]:
    """0, or for lines that may coincide more the earlier they are drawn, so that each shows below the next."""
    return [min(3, len(chart.lines) - 1 - i) if chart.nested else 0 for i in range(len(chart.lines))]


def _line(line: Line, x: Callable[[float], float], y: Callable[[float], float], points: bool, thick: int) -> Markup:
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
    return Markup('<g class="loss {}" data-index="{}" data-label="{}" data-values="{}">{}</g>').format(
        _classes(line.index) + (f" t{thick}" if thick else ""), line.index, line.label,
        json.dumps(values, separators=(",", ":"), ensure_ascii=False), Markup("").join(pieces),
    )  # fmt: skip


def _dots(dots: Dots, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
    marks = [Markup('<circle cx="{}" cy="{}" r="1.8"/>').format(x(a), y(b)) for a, b in dots.points]
    return Markup('<g class="dots {}">{}</g>').format(_classes(dots.index), Markup("").join(marks))


def _unbroken(line: Line) -> list[list[tuple[float, float]]]:
    """The line's points, cut at gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(line.steps, line.mean):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in places)


# ---- bars and squares


def _bars(bars: Bars) -> Markup:
    """Horizontal bars from 0, each below the name of its series and with its value at its end."""
    most = max([abs(v) for v in bars.values if v is not None], default=0.0) or 1.0
    rows = []
    for place, (index, label, value) in enumerate(zip(bars.indices, bars.labels, bars.values)):
        at = round(place * _ROW * 1.5, 1)
        length = round(abs(value or 0.0) / most * (WIDTH - 70), 1)
        shown = f"{value:.0f}" if bars.counts and value is not None else short(value)
        rows.append(
            Markup(
                '<g class="{}"><text x="0" y="{}">{}</text><rect class="bar" x="0" y="{}" width="{}" height="14" rx="2"/>'
                '<text class="value" x="{}" y="{}">{}</text></g>'
            ).format(_classes(index), at + 13, label, at + 18, length, length + 6, at + 29, shown)
        )
    return _frame(len(bars.labels) * _ROW * 1.5 + 4, bars.title, *rows)


def _heat(heat: Heat) -> Markup:
    """A square for each pair; columns carry the numbers that stand before the names of the rows."""
    count = len(heat.labels)
    left = 130.0
    size = (WIDTH - left) / count
    high = min(size, 34.0)
    cells = []
    for i, (label, row) in enumerate(zip(heat.labels, heat.values)):
        y = round(20 + i * high, 1)
        cells.append(Markup('<text x="0" y="{}">{} {}</text>').format(round(y + high / 2 + 4, 1), i + 1, _clipped(label)))
        cells.append(Markup('<text class="x" x="{}" y="12">{}</text>').format(round(left + (i + 0.5) * size, 1), i + 1))
        for j, value in enumerate(row):
            x = round(left + j * size, 1)
            known = 0.0 if value is None else value
            cells.append(
                Markup('<rect class="{}" fill-opacity="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                    "against" if known < 0 else "along", round(0.6 * abs(known), 3), x, y, round(size - 1, 1), round(high - 1, 1)
                )
            )
            cells.append(
                Markup('<text class="cell" x="{}" y="{}">{}</text>').format(
                    round(x + size / 2, 1), round(y + high / 2 + 4, 1), "–" if value is None else f"{value:.2f}"
                )
            )
    return _frame(20 + count * high + 2, heat.title, *cells)


def _clipped(label: str) -> str:
    return label if len(label) <= 17 else f"{label[:16]}…"
