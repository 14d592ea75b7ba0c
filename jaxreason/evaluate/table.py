"""Results side by side: a column for each model or strategy, with differences to the first, paired by problem."""

import math
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from jaxreason.evaluate.run import Result, difference
from jaxreason.terminal import console

_PLAIN = {
    "accuracy_if_finished": ("accuracy if finished", "{:.1%}"),
    "truncated_fraction": ("truncated", "{:.1%}"),
    "format_fraction": ("answer in the asked form", "{:.1%}"),
    "tokens": ("tokens an answer", "{:.0f}"),
    "prompt_tokens": ("prompt tokens read", "{:.0f}"),
    "problems": ("problems", "{:.0f}"),
    "ungraded": ("ungraded", "{:.0f}"),
}


def rows(results: Mapping[str, Result]) -> list[list[str]]:
    """The cells of a table: a row's name, then one cell for each result."""
    first, *others = results.values()
    names = list(dict.fromkeys(name for result in results.values() for name in result.intervals))
    found = [[name, *(_interval(result, name) for result in results.values())] for name in names]
    if others:
        found.insert(1, ["difference, points", "", *(_difference(result, first) for result in others)])
    for name, (title, form) in _PLAIN.items():
        found.append([title, *(_cell(form, result.metrics[name]) for result in results.values())])
    return found


def _cell(form: str, value: float) -> str:
    return "none" if math.isnan(value) else form.format(value)


def _interval(result: Result, name: str) -> str:
    return result.intervals[name].percent() if name in result.intervals else ""


def _difference(result: Result, base: Result) -> str:
    found = difference(result, base)
    return found.percent().replace(" %", "") + (" *" if found.excludes_zero else "")


def show(title: str, results: Mapping[str, Result]) -> None:
    """Prints the table; * marks a difference whose interval excludes 0."""
    table = Table("", title=Text(title), title_justify="left")
    for label in results:  # a strategy's options one below the other
        table.add_column(Text(label.replace("@", "\n@")), overflow="fold")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)


def plain(results: Mapping[str, Result]) -> dict[str, dict]:
    """Metrics of each result as JSON holds them, and the differences to the first with their intervals."""
    columns: Sequence[Result] = list(results.values())
    found = {}
    for label, result in results.items():
        metrics = {name: None if value != value else value for name, value in result.metrics.items()}  # NaN is no JSON
        if result is not columns[0]:
            gap = difference(result, columns[0])
            metrics |= {"difference": gap.mean, "difference_low": gap.low, "difference_high": gap.high}
        found[label] = metrics
    return found
