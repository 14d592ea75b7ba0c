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
      UserError: a folder that is no run, runs of different algorithms, the same config and seed twice, a source whose rows
        changed between two of the runs.
    """
    runs = [read_run(path) for path in paths]
    algorithms = {run.config["algorithm"]: run.path for run in runs}
    if len(algorithms) > 1:
        raise UserError(
            "runs of different algorithms have no metrics in common: "
            + ", ".join(f"{path} is {name}" for name, path in algorithms.items())
        )
    _of_the_same_rows(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(json.dumps(_compared(run.config), sort_keys=True), [])
        if twin := [other for other in group if other.seed == run.seed]:
            raise UserError(f"{twin[0].path} and {run.path} have the same config and seed {run.seed}; give one of them")
        group.append(run)
    members = list(groups.values())
    names = labels([_compared(group[0].config) for group in members])
    return [Variant(n, sorted(group, key=lambda run: run.seed)) for n, group in zip(names, members)]


OF_PLACE = {"resolved.weights", "resolved.teacher"}  # where they lay; their digests say what they were
ROWS = "resolved.data"  # a digest of the rows; a program that writes rows writes others for every seed


def _compared(config: dict) -> dict[str, Any]:
    """The config as dotted keys, without seed, name and place, nor where and how fast it ran, nor the seed's rows."""
    apart = OF_PLACE | {ROWS} | cfg.RESUMABLE
    return {k: v for k, v in _flat(config).items() if not k.startswith(("run.", "mesh.")) and k not in apart}


def _of_the_same_rows(runs: Sequence[Run]) -> None:
    """Raises UserError where runs with the same seed and settings of data and model were trained on different rows."""
    first: dict[str, tuple[Run, str]] = {}
    for run in runs:
        values = _compared(run.config)
        key = json.dumps([run.seed, {k: v for k, v in values.items() if k.startswith(("data.", "model.", "rollout."))}])
        rows = _flat(run.config).get(ROWS)
        if rows is None:  # of a run from before it was written
            continue
        other, seen = first.setdefault(key, (run, rows))
        if rows != seen:
            raise UserError(
                f"{other.path} and {run.path} name the same data.source {run.config['data']['source']} and seed {run.seed} but "
                "were trained on different rows: the source changed between them. Compare runs of the same rows"
            )


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
