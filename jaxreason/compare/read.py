"""A comparison read from the files of runs: who is compared with whom, and what each run recorded."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxreason import config as cfg
from jaxreason.checkpoint import write_json
from jaxreason.data.directory import read_json
from jaxreason.errors import UserError

OFFLINE = "offline.json"
_TAIL_BYTES = 8 * 2**20  # of samples.jsonl: more than one step's completions, less than a long run's file


@dataclass(frozen=True)
class Run:
    """What a run wrote."""

    path: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]  # one a step, with "step"
    summary: dict[str, Any] | None  # None: not finished
    samples: list[dict[str, Any]]  # of its last step

    @property
    def seed(self) -> int:
        return self.config["run"]["seed"]

    @property
    def last_step(self) -> int:
        return self.records[-1]["step"]

    def series(self, metric: str) -> dict[int, float | None]:
        """The metric by step; None where it was not finite."""
        return {r["step"]: number(r[metric]) for r in self.records if metric in r}

    def first(self, metric: str) -> float | None:
        """The metric's value before training."""
        return number(self.records[0].get(metric)) if self.records[0]["step"] == 0 else None

    def last(self, metric: str) -> float | None:
        """The metric's latest value."""
        return next((number(r[metric]) for r in reversed(self.records) if metric in r), None)


@dataclass(frozen=True)
class Variant:
    """Runs of one config with different seeds."""

    label: str
    runs: list[Run]  # by seed


def number(value: Any) -> float | None:
    """A finite float, or None: metrics.jsonl holds ``"nan"`` and ``"inf"`` as strings."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_run(path: Path) -> Run:
    """Reads a run's folder, finished or not. Raises UserError naming the file that is missing or damaged."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (path / name).is_file():
            raise UserError(f"{path}: no {name}, so this is not a run that has trained; give the folder of a run")
    config = cfg.read_run(path / "config.yaml")
    records = _json_lines(path / "metrics.jsonl")
    if not records:
        raise UserError(f"{path / 'metrics.jsonl'}: no step yet; run its training first")
    summary = read_json(path / "summary.json") if (path / "summary.json").is_file() else None
    return Run(path, config, records, summary, _last_samples(path / "samples.jsonl"))


def _json_lines(path: Path) -> list[dict]:
    """Every line's object. The last line may be cut short, by a kill or because it is being written right now."""
    # What follows the last newline is empty, or a line that is not whole.
    *lines, _ = path.read_bytes().split(b"\n")
    found = []
    for at, line in enumerate(lines, 1):
        try:
            found.append({"step": json.loads(line)["step"], **json.loads(line)})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {at}: not a JSON object with a step; the file is damaged") from None
    return found


def _last_samples(path: Path) -> list[dict]:
    """The samples of the last step, from the end of a file that may be large."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        start = max(0, path.stat().st_size - _TAIL_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")[1 if start else 0 : -1]  # whole lines only
    try:
        samples = [json.loads(line) for line in lines]
        return [s for s in samples if s["step"] == samples[-1]["step"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not all of its last lines are JSON objects with a step; the file is damaged") from None


def read_variants(paths: Sequence[Path]) -> list[Variant]:
    """Runs grouped by what differs between them beside seed, name and place, in the order given.

    Raises:
      UserError: a folder that is no run, runs of different algorithms, the same config and seed twice.
    """
    runs = [read_run(path) for path in paths]
    algorithms = {run.config["algorithm"]: run.path for run in runs}
    if len(algorithms) > 1:
        raise UserError(
            "runs of different algorithms have no metrics in common: "
            + ", ".join(f"{path} is {name}" for name, path in algorithms.items())
        )
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(json.dumps(_compared(run.config), sort_keys=True), [])
        if twin := [other for other in group if other.seed == run.seed]:
            raise UserError(f"{twin[0].path} and {run.path} have the same config and seed {run.seed}; give one of them")
        group.append(run)
    members = list(groups.values())
    names = labels([_compared(group[0].config) for group in members])
    return [Variant(n, sorted(group, key=lambda run: run.seed)) for n, group in zip(names, members)]


def _compared(config: dict) -> dict[str, Any]:
    """The config as dotted keys, without seed, name and place, nor where and how fast it ran."""
    return {k: v for k, v in _flat(config).items() if not k.startswith("run.") and k not in cfg.RESUMABLE}


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each config (dotted keys): its loss, and what else tells it from the others."""
    names = [config["loss.name"] for config in configs]
    short = [name.rpartition(":")[2] for name in names]
    unique = len(set(short)) == len(set(names))
    keys = dict.fromkeys(key for config in configs for key in config if key != "loss.name")
    differing = [key for key in keys if len({json.dumps(config.get(key, "∅")) for config in configs}) > 1]
    differing.sort(key=lambda key: not key.startswith("loss."))
    return [
        " ".join([
            short[i] if unique else names[i],
            *(f"{key.removeprefix('loss.options.')}={_word(config[key])}" for key in differing if key in config),
        ])
        for i, config in enumerate(configs)
    ]  # fmt: skip


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def common_config(variants: Sequence[Variant]) -> str:
    """The first run's config as YAML, for the reader."""
    return yaml.safe_dump(variants[0].runs[0].config, sort_keys=False, allow_unicode=True)


def write_offline(where: Path, measured: dict) -> None:
    """Puts a measurement beside the runs, where the report finds it."""
    where.mkdir(parents=True, exist_ok=True)
    write_json(where / OFFLINE, measured)


def read_offline(where: Path) -> dict | None:
    path = where / OFFLINE
    return json.loads(path.read_text()) if path.is_file() else None
