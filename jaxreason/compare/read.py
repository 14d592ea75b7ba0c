"""A comparison read from the files of runs: who is compared with whom."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxreason import config as cfg
from jaxreason.checkpoint import write_json
from jaxreason.data.directory import read_json
from jaxreason.errors import UserError
from jaxreason.report.read import Run, Variant, read_run

OFFLINE = "offline.json"
FORMAT = 2  # of offline.json


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
    """The measurement in a folder, if there is one. Raises UserError for one of another version."""
    path = where / OFFLINE
    if not path.is_file():
        return None
    measured = read_json(path)
    if measured.get("format") != FORMAT:
        raise UserError(f"{path} was measured by another version of jaxreason: run --offline again, or delete the file")
    return measured
