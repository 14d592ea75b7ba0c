"""What a run wrote, read from its folder."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxreason import config as cfg
from jaxreason.data.directory import read_json
from jaxreason.errors import UserError
from jaxreason.origin import read_origins

_TAIL_BYTES = 8 * 2**20  # of either end of samples.jsonl: more than one step's completions, less than a long run's file


@dataclass(frozen=True)
class Run:
    """What a run wrote."""

    path: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]  # one a step, with "step"
    summary: dict[str, Any] | None  # None: not finished
    samples: list[dict[str, Any]]  # of its last step
    origins: list[dict[str, Any]]  # what started it, one record a start; none: of a run from before they were written

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
    return Run(path, config, records, summary, read_samples(path / "samples.jsonl", "last"), read_origins(path))


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


def read_samples(path: Path, which: Literal["first", "last"]) -> list[dict]:
    """The samples of the first or of the last step, from that end of a file that may be large; none without a file."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        start = max(0, path.stat().st_size - _TAIL_BYTES) if which == "last" else 0
        file.seek(start)
        lines = file.read(_TAIL_BYTES).split(b"\n")[1 if start else 0 : -1]  # whole lines only
    try:
        samples = [json.loads(line) for line in lines]
        return [s for s in samples if s["step"] == samples[-1 if which == "last" else 0]["step"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not all of its {which} lines are JSON objects with a step; the file is damaged") from None
