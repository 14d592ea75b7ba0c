"""A pipeline for people: what every stage measured and made, as a table and as a page that links to those of its runs."""

import dataclasses
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
_HAS = {"build": {"kept", "drawn", "dropped"}}  # what the table needs of a stage; of a run its last step


@dataclasses.dataclass(frozen=True)
class Done:
    """What a finished stage leaves."""

    name: str
    kind: str  # sft, grpo or build
    found: dict[str, Any]  # a run's summary, or the report of built data

    @property
    def accuracy(self) -> tuple[float, float, float] | None:
        """(value, low, high) of the held-out accuracy at a run's end; None where it measured none."""
        value, low, high = (number(self.found.get(f"eval_accuracy{end}")) for end in ("", "_low", "_high"))
        return None if value is None or low is None or high is None else (value, low, high)


def read_stages(root: Path) -> list[Done]:
    """The stages of the finished pipeline in ``root``. Raises UserError for a damaged file."""
    try:
        if not isinstance(found := json.loads((root / FILE).read_bytes()), list):
            raise TypeError(found)
        stages = [Done(**each) for each in found]
        for stage in stages:
            if missing := _HAS.get(stage.kind, {"step"}) - stage.found.keys():
                raise ValueError(missing)
        return stages
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{root / FILE} is damaged; the pipeline's own command, started again, writes it anew") from None


def write_pipeline_report(root: Path, stages: Sequence[Done]) -> Path:
    """Writes ``root``/report.html and returns its path. The page of a stage is linked where it is there."""
    pages = {stage.name: f"{stage.name}/{NAME}" for stage in stages if (root / stage.name / NAME).is_file()}
    text = page.render(
        (resources.files(__package__) / "pipeline.html").read_text(), title=root.name, lead=_lead(stages),
        chart=_chart(stages), stages=stages_table(stages), pages=pages,
        built=[_left_out(stage) for stage in stages if stage.kind == "build"],
    )  # fmt: skip
    (root / NAME).write_bytes(text.encode("utf-8", "replace"))
    return root / NAME


def stages_table(stages: Sequence[Done]) -> Table:
    """A line for every stage. The tokens are those of an answer to a held-out problem, on average."""
    header = ["stage", "held-out accuracy", "kind", "done", "training", "tokens"]
    return Table("stages", "Stages", header, [[stage.name, *_cells(stage)] for stage in stages])


def _cells(stage: Done) -> list[str]:
    found = stage.found
    if stage.kind == "build":
        return ["–", stage.kind, f"kept {found['kept']:,} of {found['drawn']:,}", "–", "–"]
    spent, length = number(found.get("train_seconds")), number(found.get("eval_completion_tokens"))
    return [
        "not measured" if stage.accuracy is None else _percent(stage.accuracy), stage.kind, f"{found['step']:,} steps",
        "–" if spent is None else f"{spent / 60:.1f} min", "–" if length is None else f"{length:.0f}",
    ]  # fmt: skip


def _percent(accuracy: tuple[float, float, float]) -> str:
    value, low, high = (100 * each for each in accuracy)
    return f"{value:.1f} % ({low:.1f}–{high:.1f})"


def _lead(stages: Sequence[Done]) -> str:
    """A sentence: the accuracies in order, and where the highest is."""
    measured = {stage.name: stage.accuracy for stage in stages if stage.accuracy}
    if not measured:
        return "No stage graded held-out problems, so what the pipeline learned to answer is not known (eval.problems)."
    told = " → ".join(f"{name} {_percent(accuracy)}" for name, accuracy in measured.items())
    return f"Accuracy on held-out problems, stage by stage: {told}. The highest is {max(measured, key=measured.__getitem__)}'s."


def _chart(stages: Sequence[Done]) -> Chart | None:
    """Accuracy over the stages' numbers; None where none was measured."""
    measured = [(place, stage.name, stage.accuracy) for place, stage in enumerate(stages, 1) if stage.accuracy]
    if not measured:
        return None
    mean, low, high = (list(side) for side in zip(*(accuracy for _, _, accuracy in measured)))
    line = Line(0, "held-out accuracy", [place for place, _, _ in measured], mean, low, high)
    names = ", ".join(f"{place} {name}" for place, name, _ in measured)
    note = f"At the end of each stage that trains, with the 95 % interval of its problems: {names}."
    return Chart("accuracy", "Held-out accuracy", note, [line], marked=True, axis="stage")


def _left_out(stage: Done) -> Table:
    """Why traces of a stage that built data are no rows."""
    found: Mapping[str, Any] = stage.found
    rows = [["kept", f"{found['kept']:,}"], *([reason, f"{count:,}"] for reason, count in found["dropped"].items())]
    return Table(stage.name, f"Traces of {stage.name}", ["what became of them", "traces"], rows)
