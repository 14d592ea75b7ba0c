"""A run's folder: what is in it, what it resumes from, and whether it may be written."""

import json
import os
import time
from pathlib import Path

import jax
import numpy as np
import yaml

from jaxreason import config as cfg
from jaxreason import origin
from jaxreason.checkpoint import Base, Checkpoints, write_json
from jaxreason.checkpoint import steps as checkpoint_steps
from jaxreason.errors import UserError
from jaxreason.locks import Owner
from jaxreason.paths import local
from jaxreason.terminal import console
from jaxreason.train import hosts

_FILES_APPEAR = 60.0  # seconds: NFS remembers that long that there was no such file


class RunFolder:
    """``runs/NAME``: config.yaml, metrics.jsonl, checkpoints/, data_report.json, origin.json, summary.json, tokenizer/.

    Raises UserError, when it is made, if the folder belongs to another config.
    """

    def __init__(self, config: cfg.RunConfig):
        self.path = local(config.run.dir, "run.dir") / config.run.name
        self.checkpoints = self.path / "checkpoints"
        self._config = config
        self.resolved = cfg.Resolved()
        self._owner: Owner | None = None
        self.resume = self._resumable()  # optimizer step of the newest checkpoint, or None

    def _resumable(self) -> int | None:
        old = self._written()
        if old is None:
            return None
        new = yaml.safe_load(cfg.dump(self._config))
        changed = {k: v for k, v in cfg.differences(old, new).items() if not cfg.may_change(k)}
        if changed:
            lines = "\n".join(f"  {key}: {was!r} there, {now!r} now" for key, (was, now) in changed.items())
            raise UserError(
                f"{self.path} holds a run of another config:\n{lines}\n"
                "set run.name to a new name, restore these keys to resume it, or delete the folder to start again"
            )
        found = checkpoint_steps(self.checkpoints)
        if not found:
            return None
        self.resolved = cfg.Resolved.model_validate(old.get("resolved") or {})
        return found[-1]

    def _written(self) -> dict | None:
        """The config that the folder's run has; None for no folder, and for one in which no run has begun.

        Raises UserError for a folder that is not a run's: what is in it is somebody's.
        """
        fix = "set run.name or run.dir to a folder that is not there yet"
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; {fix}")
        saved = self.path / "config.yaml"
        if saved.is_file():
            try:
                return cfg.read_run(saved)
            except UserError as error:
                raise UserError(f"{self.path} cannot be resumed: {error}; {fix}") from None
        names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        if others := sorted(names - {Owner.NAME, "config.yaml.tmp"}):
            raise UserError(f"{self.path} is not the folder of a run (no config.yaml, but {', '.join(others[:3])}); {fix}")
        return None

    def settle(self, resolved: cfg.Resolved) -> None:
        """Takes what the config's names mean now, for config.yaml. Raises UserError if a run to be resumed had other data."""
        if self.resume is None:
            self.resolved = resolved
        elif self.resolved.data not in (None, resolved.data):
            raise UserError(
                f"{self.path}: data.source {self._config.data.source} is not what this run was trained on so far (its content, "
                "or what the tokenizer and the template make of it, changed): restore it to resume, or set run.name to a new name"
            )

    def summary(self) -> dict | None:
        """The summary of a finished run."""
        path = self.path / "summary.json"
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; remove it, and the same command writes it again") from None

    def saved(self) -> Checkpoints:
        """The run's checkpoints."""
        resolved = self.resolved
        base = Base(resolved.weights, resolved.weights_digest) if self._config.lora.rank and resolved.weights else None
        return Checkpoints(self.checkpoints, self._config.train.keep_checkpoints, base)

    def finished(self, updates: int) -> dict | None:
        """The summary, if nothing of a run of ``updates`` optimizer steps is left to do."""
        return self.summary() if self.resume is not None and self.resume >= updates else None

    def agree(self, total: int) -> None:
        """Raises UserError on all processes if they have not found the same: what to resume from, and where to end."""
        if not hosts.alike(np.array([self.resume or 0, total])):
            raise UserError(
                f"the processes differ: this one finds checkpoint {self.resume or 'none'} and {total} steps to do; all of "
                f"them need the same data, and the same {self.path} on storage that they share"
            )

    def start(self, step: int | None) -> None:
        """Creates the folder, writes config.yaml, and drops the lines of steps after ``step``; None: of every step.

        From here on this process owns the folder, until :meth:`release`. Raises UserError if another one does, and on all
        processes if one does not see what process 0 writes: a checkpoint would be parts.
        """
        if jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self._owner = Owner(self.path)
            if max(checkpoint_steps(self.checkpoints), default=None) != self.resume:
                raise UserError(f"{self.path}: another process trained here meanwhile; run the same command again")
            temporary = self.path / "config.yaml.tmp"
            temporary.write_text(cfg.dump(self._config.model_copy(update={"resolved": self.resolved})))
            os.replace(temporary, self.path / "config.yaml")
            write_json(self.path / origin.FILE, [*origin.read_origins(self.path), origin.origin()])
            (self.path / "summary.json").unlink(missing_ok=True)
            for name in ("metrics.jsonl", "samples.jsonl"):
                keep_lines(self.path / name, -1 if step is None else step)
        hosts.largest(0)  # process 0 has written
        if not hosts.alike(np.array([self._sees_config()])):
            raise UserError(f"{self.path}: not all processes see what process 0 writes; set run.dir to storage that they share")

    def _sees_config(self) -> bool:
        """Whether config.yaml is here; a network file system may show it to other hosts a while later."""
        until = time.monotonic() + _FILES_APPEAR
        while not (self.path / "config.yaml").is_file():
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        return True

    def release(self) -> None:
        """Lets another process write the folder."""
        if self._owner:
            self._owner.release()

    def lines(self) -> list[dict]:
        """What metrics.jsonl holds."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line] if path.is_file() else []

    def finish(self, summary: dict) -> None:
        """Writes summary.json, which says that the run is done."""
        if jax.process_index() == 0:
            write_json(self.path / "summary.json", summary)


def keep_lines(path: Path, step: int) -> None:
    """Keeps the lines of a JSONL file up to ``step``, each as it is; the last line goes too if a kill cut it short.

    A line that is damaged is said, and moved to ``FILE.damaged``.
    """
    if not path.exists():
        return
    temporary, damaged = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".damaged")
    with open(path, "rb") as lines, open(temporary, "wb") as kept:
        # Only a newline ends a line of a binary file: text may hold other characters that end one for str.splitlines.
        for number, line in enumerate(lines, 1):
            if (found := _step_of(line)) is not None:
                kept.write(line if found <= step else b"")
            elif line.endswith(b"\n"):
                with open(damaged, "ab") as aside:
                    aside.write(line)
                console.print(f"{path}, line {number}: damaged (not a JSON object with a step); moved to {damaged}", markup=False)
    os.replace(temporary, path)


def _step_of(line: bytes) -> int | None:
    """The step that a whole line is of; None for a damaged line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if line.endswith(b"\n") and isinstance(step, int) else None
