"""A run's folder: its config, its metrics, what it resumes from, and what a person sees while it works."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxreason import config as cfg
from jaxreason.checkpoint import steps as checkpoint_steps
from jaxreason.checkpoint import write_json
from jaxreason.errors import UserError
from jaxreason.train import hosts

console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
_FILES_APPEAR = 60.0  # seconds: NFS remembers that long that there was no such file
_HEARTBEAT = 10.0  # seconds between lines where there is no terminal to draw a bar on


class RunDir:
    """``runs/NAME``: config.yaml, metrics.jsonl, checkpoints/, data_report.json, summary.json, tokenizer/."""

    def __init__(self, config: cfg.RunConfig):
        self.path = Path(config.run.dir) / config.run.name
        self.checkpoints = self.path / "checkpoints"
        self._config = config

    def resumable(self) -> int | None:
        """The step to resume from, or None. Raises UserError if the folder belongs to another config."""
        found = checkpoint_steps(self.checkpoints)
        saved = self.path / "config.yaml"
        if not found:
            return None
        if not saved.is_file():
            raise UserError(f"{self.path} has checkpoints but no config.yaml; set run.name to a new name, or delete it")
        old, new = yaml.safe_load(saved.read_text()), yaml.safe_load(cfg.dump(self._config))
        changed = {k: v for k, v in cfg.differences(old, new).items() if k not in cfg.RESUMABLE}
        if changed:
            lines = "\n".join(f"  {key}: {was!r} there, {now!r} now" for key, (was, now) in changed.items())
            raise UserError(
                f"{self.path} holds a run of another config:\n{lines}\n"
                "set run.name to a new name, restore these keys to resume it, or delete the folder to start again"
            )
        return found[-1]

    def summary(self) -> dict | None:
        path = self.path / "summary.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def agree(self, resume: int | None, total: int) -> None:
        """Raises UserError on all processes if they have not found the same: what to resume from, and where to end."""
        if not hosts.alike(np.array([resume or 0, total])):
            raise UserError(
                f"the processes differ: this one finds checkpoint {resume or 'none'} and {total} steps to do; all of them "
                f"need the same data, and the same {self.path} on storage that they share"
            )

    def start(self, step: int) -> None:
        """Creates the folder, writes config.yaml, and drops metrics of steps that will be run again.

        Raises UserError on all processes if one does not see what process 0 writes: a checkpoint would be parts.
        """
        if jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.path / "config.yaml.tmp"
            temporary.write_text(cfg.dump(self._config))
            os.replace(temporary, self.path / "config.yaml")
            (self.path / "summary.json").unlink(missing_ok=True)
            for name in ("metrics.jsonl", "samples.jsonl"):
                _keep_lines(self.path / name, step)
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

    def finish(self, summary: dict) -> None:
        if jax.process_index() == 0:
            write_json(self.path / "summary.json", summary)


def _keep_lines(path: Path, step: int) -> None:
    """Keeps the whole lines of a JSONL file up to ``step``; a line that a kill cut short goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                continue
        except (ValueError, KeyError):
            continue
        kept.append(line + "\n")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


class Log:
    """metrics.jsonl, a progress bar with ETA (or heartbeat lines), TensorBoard and Weights & Biases where asked."""

    def __init__(self, run: RunDir, config: cfg.RunConfig, total: int, start: int, shown: tuple[str, ...]):
        self._primary = jax.process_index() == 0
        self._shown, self._total = shown, total
        self._file = open(run.path / "metrics.jsonl", "a") if self._primary else None
        self._sinks = _sinks(run, config, start) if self._primary else []
        self._started, self._spoke, self._first = time.monotonic(), 0.0, start
        self._live = self._primary and console.is_terminal
        columns = ("step", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "eta", TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=console, disable=not self._live)
        self._task = self._bar.add_task("train", total=total, completed=start, text="")
        self._bar.start()

    def write(self, step: int, record: dict[str, float]) -> None:
        """One object a step."""
        if not self._primary:
            return
        self._file.write(json.dumps({"step": step, **{k: _number(v) for k, v in record.items()}}) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink(step, record)
        text = " ".join(f"{name} {_short(record[name])}" for name in self._shown if name in record)
        self._bar.update(self._task, completed=step, text=text)
        now = time.monotonic()
        if not self._live and (now - self._spoke > _HEARTBEAT or step == self._total):
            rate = (now - self._started) / max(1, step - self._first)
            console.print(f"step {step}/{self._total} eta {rate * (self._total - step):.0f}s {text}")
            self._spoke = now

    def close(self) -> None:
        self._bar.stop()
        if self._file:
            self._file.close()


def _sinks(run: RunDir, config: cfg.RunConfig, start: int) -> list:
    sinks = []
    if config.train.tensorboard:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("train.tensorboard=true needs the package: pip install tensorboardX") from None
        writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=start + 1)
        sinks.append(lambda step, record: [writer.add_scalar(k, v, step) for k, v in record.items()])
    if config.train.wandb:
        try:
            import wandb
        except ImportError:
            raise UserError(f"train.wandb={config.train.wandb} needs the package: pip install wandb") from None
        wandb.init(project=config.train.wandb, name=config.run.name, config=config.model_dump(), resume="allow")
        sinks.append(lambda step, record: wandb.log(record, step=step))
    return sinks


def _number(value: Any) -> Any:
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    value = float(value)
    return value if math.isfinite(value) else repr(value)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class Interrupt:
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop after the current step.

    Of several processes one alone may be told (a spot host that goes away), and all must stop after the same step, since
    the checkpoint is collective. They exchange one number a step, where the step's metrics have just brought them
    together: 5 ms over gloo on two busy cores. jax's own protocol (``multihost_utils.reached_preemption_sync_point``) costs
    nothing, but its C++ handler of SIGTERM and this one exclude each other, it knows no Ctrl-C, and it swallows a SIGTERM
    that comes before there is anything to save; so ``jaxreason.distributed`` switches it off.
    """

    def __init__(self):
        self.requested = False
        self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def agreed(self) -> bool:
        """Whether any process was asked, so that all of them stop after the same step; one number a step is exchanged."""
        return hosts.largest(int(self.requested)) > 0

    def _ask(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)


def check_finite(step: int, metrics: dict, params: Any) -> None:
    """Raises UserError if the loss or a gradient of this step is not finite, naming the parameters concerned."""
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    bad = [path for path, norm in zip(paths, np.asarray(metrics["leaf_norms"])) if not np.isfinite(norm)]
    raise UserError(
        f"step {step}: loss is {metrics['loss']}, gradient norm is {metrics['grad_norm']}; not finite: "
        f"{', '.join(bad[:4]) or 'the loss alone'}{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}; "
        "nothing of this step was saved; lower optimizer.learning_rate or optimizer.max_grad_norm, or look at the batch"
    )


def show_table(title: str, rows: list[tuple[str, Any]]) -> None:
    """A two-column table on the terminal."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(name, str(value))
    console.print(table)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
