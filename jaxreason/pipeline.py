"""Stages in one command: each is an ordinary run, or a folder of built data, and what is done is not done again."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table

from jaxreason import config as cfg
from jaxreason.checkpoint import write_json
from jaxreason.command import told
from jaxreason.curate.rows import BuildJob, build
from jaxreason.errors import UserError
from jaxreason.evaluate.estimates import Interval
from jaxreason.paths import local
from jaxreason.report import end
from jaxreason.report.pipeline import FILE
from jaxreason.rl import grpo
from jaxreason.terminal import console
from jaxreason.train import sft
from jaxreason.train.folder import RunFolder
from jaxreason.weights import locate


@dataclasses.dataclass(frozen=True)
class Done:
    """What a finished stage leaves: a run's summary, or a report of built data."""

    name: str
    kind: str
    found: dict[str, Any]


def run(pipeline: cfg.Pipeline, configs: dict[str, cfg.RunConfig | cfg.Build]) -> list[Done] | None:
    """Runs the stages in order, each from where it stopped, and prints what every one measured; None where it was stopped.

    A run that is finished is skipped. Raises UserError where a stage was made with another config or from other weights.
    """
    root, done = local(pipeline.dir, "dir"), list[Done]()
    for config in configs.values():
        if not isinstance(config, cfg.Build):
            RunFolder(config)  # one of another config is refused before the first stage runs
    for number, stage in enumerate(pipeline.stages, 1):
        config = configs[stage.name]
        console.print(f"stage {number}/{len(pipeline.stages)}: {stage.name}", markup=False)
        if isinstance(config, cfg.Build):
            harvest = stage.build
            assert harvest is not None and stage.start is not None  # the config's own check
            job = BuildJob(str(root / stage.start), harvest.source, harvest.samples, root / stage.name, config)
            done.append(Done(stage.name, "build", build(job)))
            continue
        if (summary := _trained(config, root / stage.start if stage.start else None)) is None:
            return None
        done.append(Done(stage.name, config.algorithm, summary))
    write_json(root / FILE, stages := [dataclasses.asdict(each) for each in done])
    show(done)
    end.of_pipeline(root, stages, told)
    return done


def _trained(config: cfg.RunConfig, start: Path | None) -> dict[str, Any] | None:
    """The summary of a stage that trains, which is run if it has none."""
    folder = RunFolder(config)
    if start and folder.resolved.weights_digest not in (None, locate(str(start)).digest()):
        raise UserError(
            f"{folder.path} was trained from other weights than {start} has now: delete it, and the stages after it, to "
            "train them again"
        )
    if (summary := folder.summary()) is not None:
        console.print(f"{folder.path} is finished", markup=False)
        return summary
    found = sft.train(config) if isinstance(config, cfg.SftConfig) else grpo.train(config)
    if found is not None:
        end.write(str(folder.path), told)
    return found


def accuracy(summary: dict[str, Any]) -> Interval | None:
    """The held-out accuracy that a run ended with; None where it measured none."""
    names = ("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high")
    return Interval(*(summary[name] for name in names)) if all(name in summary for name in names) else None


def show(done: list[Done]) -> None:
    """Prints a line for every stage; ``tokens`` are those of an answer to a held-out problem, on average."""
    table = Table("stage", "kind", "done", "held-out accuracy", "tokens", title="pipeline", title_justify="left")
    for stage in done:
        if stage.kind == "build":
            kept = f"{stage.found['kept']} of {stage.found['drawn']} traces kept"
            table.add_row(stage.name, stage.kind, kept, "", "")
            continue
        found = accuracy(stage.found)
        length = stage.found.get("eval_completion_tokens")
        table.add_row(
            stage.name, stage.kind, f"{stage.found['step']} steps", found.percent() if found else "not measured",
            f"{length:.0f}" if length is not None else "",
        )  # fmt: skip
    console.print(table)
