"""Figures as PNG and PDF, through matplotlib (extra ``report``)."""

import importlib.util
from pathlib import Path
from typing import Any

from jaxreason.report.charts import COLOURS, short, thickness
from jaxreason.report.figures import Bars, Chart, Figure, Heat, extent

FORMATS = ("png", "pdf")
MISSING = 'PNG and PDF of the figures need matplotlib: pip install "jaxreason[report]", then the same command again.'
_INCHES = (5.2, 3.2)
_PALETTE = ("#1f6fd0", "#d9570f", "#0d8f63", "#b98200", "#c9487f", "#6a4fc9", "#4d7c0f", "#c33131")  # page.css, light


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write(figure: Figure, stem: Path) -> None:
    """Writes ``stem``.png at 200 dots an inch and ``stem``.pdf. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=_INCHES, layout="constrained")
    axes: Any = canvas.add_subplot()
    axes.set_title(_plain(figure.title), fontsize=10)
    axes.tick_params(labelsize=8)
    if isinstance(figure, Chart):
        _chart(figure, axes)
    elif isinstance(figure, Bars):
        _bars(figure, axes)
    else:
        _heat(figure, axes)
    for kind in FORMATS:
        # Without the date, so that the same figure is the same file.
        canvas.savefig(stem.with_suffix(f".{kind}"), dpi=200, metadata={"CreationDate": None} if kind == "pdf" else None)


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula, and no half of a surrogate pair."""
    return text.replace("$", r"\$").encode("utf-8", "replace").decode()


def _colour(index: int) -> str:
    return _PALETTE[index % COLOURS]


def _chart(chart: Chart, axes: Any) -> None:
    for line, thick in zip(chart.lines, thickness(chart)):
        colour, dash = _colour(line.index), "--" if line.index >= COLOURS else "-"
        mean, low, high = ([float("nan") if v is None else v for v in side] for side in (line.mean, line.low, line.high))
        marker = "o" if chart.marked or len(mean) == 1 else None
        label, wide = _plain(line.label), 1.4 + 1.8 * thick
        axes.plot(line.steps, mean, dash, color=colour, label=label, linewidth=wide, marker=marker, markersize=3)
        if low != high:
            axes.fill_between(line.steps, low, high, color=colour, alpha=0.15, linewidth=0)
    for dots in chart.dots:
        axes.scatter(*zip(*dots.points or [(float("nan"), float("nan"))]), s=3, color=_colour(dots.index),
                     label=_plain(dots.label), alpha=0.6)  # fmt: skip
    axes.set_ylim(*extent(chart))
    axes.set_xlabel(chart.axis, fontsize=8)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.legend(fontsize=7, frameon=False)


def _bars(bars: Bars, axes: Any) -> None:
    values = [0.0 if v is None else v for v in bars.values]
    drawn = axes.barh(range(len(values)), values, color=[_colour(i) for i in bars.indices])
    axes.bar_label(drawn, [short(v) for v in bars.values], fontsize=8, padding=3)
    axes.set_yticks(range(len(values)), [_plain(label) for label in bars.labels], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _heat(heat: Heat, axes: Any) -> None:
    values = [[float("nan") if v is None else v for v in row] for row in heat.values]
    axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    places = range(len(heat.labels))
    axes.set_yticks(places, [_plain(label) for label in heat.labels], fontsize=8)
    axes.set_xticks(places, [_plain(label) for label in heat.labels], fontsize=8, rotation=30, ha="right")
    for i, row in enumerate(heat.values):
        for j, value in enumerate(row):
            dark = value is not None and abs(value) > 0.6
            axes.text(j, i, "–" if value is None else f"{value:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")  # fmt: skip
