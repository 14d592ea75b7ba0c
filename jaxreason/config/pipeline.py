"""A pipeline: stages that are ordinary runs, each of which starts from what an earlier one made."""

from typing import Any

from pydantic import Field, model_validator

from jaxreason.config.build import Build
from jaxreason.config.parse import build, find, parse_words
from jaxreason.config.run import RunConfig
from jaxreason.config.schema import Positive, Section
from jaxreason.config.text import read_yaml
from jaxreason.errors import UserError
from jaxreason.plugins import nearest

_SEEDS = 100  # stages that a seed of a pipeline has room for


class Harvest(Section):
    """A stage that builds data: what build_data.py is given."""

    source: str
    """Problems with known answers."""
    samples: Positive = 8
    """Traces of a problem."""
    options: dict[str, Any] = Field({})
    """Its ``key=value`` overrides."""


class Stage(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """The stage's folder below the pipeline's ``dir``."""
    config: str | None = None
    """A stage that trains: the config that it begins with, as train.py takes it."""
    changes: dict[str, Any] = Field({})
    """Sections and keys of that config with other values."""
    build: Harvest | None = None
    """A stage that builds data."""
    start: str | None = None
    """The stage whose model is trained on, or draws the traces; null: the weights that the config names."""
    data: str | None = None
    """The stage whose rows are trained on; null: the config's own source."""

    @model_validator(mode="after")
    def _one_kind(self):
        if (self.config is None) == (self.build is None):
            raise ValueError(f"stage {self.name}: give exactly one of config (it trains) and build (it makes data)")
        if self.build and (self.start is None or self.data or self.changes):
            raise ValueError(f"stage {self.name}: build needs start (the stage that draws) and takes no data and no changes")
        return self


class Pipeline(Section):
    dir: str
    """Where the stages are written."""
    seed: int = Field(0, ge=0, lt=2**24)
    """Stage i, from 0, has the seed 100 · seed + i."""
    stages: list[Stage] = Field(min_length=1, max_length=_SEEDS)

    @model_validator(mode="after")
    def _earlier(self):
        before: dict[str, Stage] = {}
        for stage in self.stages:
            if stage.name in before:
                raise ValueError(f"stage {stage.name} is there twice; give it another name")
            for key, other, builds in (("start", stage.start, False), ("data", stage.data, True)):
                if other is not None and (other not in before or (before[other].build is not None) != builds):
                    known = [each.name for each in before.values() if (each.build is not None) == builds]
                    what = f"no earlier stage that {'builds data' if builds else 'trains'}"
                    raise ValueError(f"stage {stage.name}: {key} is {other}, {what}; known: {', '.join(known) or 'none'}")
            before[stage.name] = stage
        return self

    def seed_of(self, stage: Stage) -> int:
        return _SEEDS * self.seed + self.stages.index(stage)


def load_pipeline(name: str, words: list[str]) -> tuple[Pipeline, dict[str, RunConfig | Build]]:
    """The pipeline that ``--config`` names and each stage's own config, with ``key=value`` and ``STAGE.key=value`` overrides.

    Every stage is checked here, so that a wrong key of the last one does not show after an hour. Raises UserError.
    """
    path = find(name if name.endswith((".yaml", ".yml")) or name.startswith("pipeline/") else f"pipeline/{name}")
    values = read_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
        raise UserError(f"{path}: no list called stages; a pipeline is made of them, as configs/pipeline/r1.yaml")
    own, others = dict[str, list[str]](), []
    names = [str(stage.get("name")) for stage in values["stages"] if isinstance(stage, dict)]
    for word in words:
        first, dot, _ = word.partition("=")[0].partition(".")
        if dot and first not in names:
            raise UserError(f"{word}: there is no stage {first}{nearest(first, names)}; known: {', '.join(names)}")
        rest = word[len(first) + 1 :]
        key, equals, text = rest.partition("=")
        harvest = values["stages"][names.index(first)].get("build") if dot else None
        if isinstance(harvest, dict) and equals and key in ("source", "samples"):
            harvest[key] = read_yaml(text, word)
        elif dot:
            own.setdefault(first, []).append(rest)
        else:
            others.append(word)
    pipeline = parse_words(Pipeline, others, values, str(path))
    return pipeline, {stage.name: _config_of(pipeline, stage, own.get(stage.name, []), str(path)) for stage in pipeline.stages}


def _config_of(pipeline: Pipeline, stage: Stage, words: list[str], where: str) -> RunConfig | Build:
    place, seed = f"{where}, stage {stage.name}", pipeline.seed_of(stage)
    if stage.build:
        return parse_words(Build, words, {"seed": seed} | stage.build.options, place)
    file = find(str(stage.config))
    values = _merged(read_yaml(file.read_bytes(), str(file)), stage.changes)
    values = _merged(values, {"run": {"name": stage.name, "dir": pipeline.dir, "seed": seed}})
    if stage.start:
        model = values.get("model", {})
        values["model"] = {k: v for k, v in model.items() if k not in ("preset", "overrides")}
        values["model"]["weights"] = f"{pipeline.dir}/{stage.start}"
    if stage.data:
        values = _merged(values, {"data": {"source": f"{pipeline.dir}/{stage.data}/rows.jsonl"}})
    return build(values, words, place)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes``, section by section."""
    done = dict(values)
    for key, value in changes.items():
        old = done.get(key)
        done[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return done
