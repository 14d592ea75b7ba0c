"""Stages in one command: each is an ordinary run, or a folder of built data, and what is done is not done again."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxreason import config as cfg
from jaxreason.checkpoint import write_json
from jaxreason.command import told
from jaxreason.curate.rows import BuildJob, build
from jaxreason.errors import UserError
from jaxreason.paths import local
from jaxreason.report import end, tables
from jaxreason.report.pipeline import FILE, Done, stages_table
from jaxreason.rl import grpo
from jaxreason.terminal import console
from jaxreason.train import sft
from jaxreason.train.folder import RunFolder
from jaxreason.weights import locate


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
    write_json(root / FILE, [dataclasses.asdict(each) for each in done])
    tables.show(stages_table(done), console)
    end.of_pipeline(root, done, told)
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
