"""The page of a pipeline: what every stage measured and made, with a link to the page of each run."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxreason.errors import UserError
from jaxreason.report import page
from jaxreason.report.figures import Chart, Line
from jaxreason.report.read import number
from jaxreason.report.run import NAME
from jaxreason.report.tables import Table

FILE = "pipeline.json"
ACCURACY = ("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high")


def write_pipeline_report(root: Path, stages: Sequence[Mapping[str, Any]]) -> Path:
    """Writes ``root``/report.html from ``stages``, in their order, and returns its path.

    Of each: ``name``, ``kind`` (sft, grpo or build), and ``found``: a run's summary or the report of built data. Its page is
    linked where ``root``/NAME/report.html is there.
    """
    measured = [(place, stage, values) for place, stage in enumerate(stages, 1) if (values := _accuracy(stage["found"]))]
    text = page.render(
        (resources.files(__package__) / "pipeline.html").read_text(), title=root.name, lead=_lead(measured),
        chart=_chart(measured) if measured else None, rows=[_row(root, stage) for stage in stages],
        built=[_left_out(stage) for stage in stages if stage["kind"] == "build"],
    )  # fmt: skip
    (root / NAME).write_bytes(text.encode("utf-8", "replace"))
    return root / NAME


def read_stages(root: Path) -> list[dict[str, Any]]:
    """The stages of the finished pipeline in ``root``. Raises UserError for a damaged file."""
    try:
        stages = json.loads((root / FILE).read_bytes())
        return [{"name": stage["name"], "kind": stage["kind"], "found": dict(stage["found"])} for stage in stages]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{root / FILE} is damaged; the pipeline's own command, started again, writes it anew") from None


def _accuracy(found: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """(accuracy, low, high) of held-out problems at a run's end."""
    value, low, high = (number(found.get(name)) for name in ACCURACY)
    return None if value is None or low is None or high is None else (value, low, high)


def _lead(measured: Sequence[tuple[int, Mapping[str, Any], tuple[float, float, float]]]) -> str:
    """A sentence: the first and the last stage's accuracy, each with its interval."""
    if not measured:
        return "No stage graded held-out problems, so what the pipeline learned to answer is not known (eval.problems)."
    told = [f"{stage['name']} {100 * a:.1f} % ({100 * low:.1f}–{100 * high:.1f})" for _, stage, (a, low, high) in measured]
    best = max(measured, key=lambda each: each[2][0])[1]["name"]
    return f"Accuracy on held-out problems, stage by stage: {' → '.join(told)}. The highest is {best}'s."


def _chart(measured: Sequence[tuple[int, Mapping[str, Any], tuple[float, float, float]]]) -> Chart:
    mean, low, high = (list(side) for side in zip(*(values for _, _, values in measured)))
    line = Line(0, "held-out accuracy", [place for place, _, _ in measured], mean, low, high)
    names = ", ".join(f"{place} {stage['name']}" for place, stage, _ in measured)
    note = f"At the end of each stage that trains, with the 95 % interval of its problems: {names}."
    return Chart("accuracy", "Held-out accuracy", note, [line], marked=True, axis="stage")


def _row(root: Path, stage: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table of stages."""
    found, values = stage["found"], _accuracy(stage["found"])
    spent, length = number(found.get("train_seconds")), number(found.get("eval_completion_tokens"))
    done = f"{found['kept']:,} of {found['drawn']:,} traces kept" if stage["kind"] == "build" else f"{found['step']:,} steps"
    cells = [
        "–" if values is None else "{:.1f} % ({:.1f}–{:.1f})".format(*(100 * value for value in values)),
        stage["kind"], done, f"{spent / 60:.1f} min" if spent else "–", "–" if length is None else f"{length:.0f}",
    ]  # fmt: skip
    return {"name": stage["name"], "page": f"{stage['name']}/{NAME}" if (root / stage["name"] / NAME).is_file() else None,
            "cells": cells}  # fmt: skip


def _left_out(stage: Mapping[str, Any]) -> Table:
    """Why traces of a stage that built data are no rows."""
    found = stage["found"]
    rows = [["kept", f"{found['kept']:,}"], *([reason, f"{count:,}"] for reason, count in found["dropped"].items())]
    return Table(stage["name"], f"Traces of {stage['name']}", ["what became of them", "traces"], rows)
