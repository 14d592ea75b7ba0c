"""Which runs a comparison is made of, and making them one after another in this process."""

import dataclasses
import gc
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.paths import local
from jaxreason.rl import grpo
from jaxreason.rl.objective import Objective, objective_of
from jaxreason.terminal import console
from jaxreason.train import sft
from jaxreason.train.folder import RunFolder

_ALGORITHMS = {"grpo": grpo, "sft": sft}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a comparison."""

    loss: str  # as the user wrote it
    seed: int
    config: cfg.RunConfig

    @property
    def path(self) -> Path:
        return local(self.config.run.dir, "run.dir") / self.config.run.name


def folder(config: cfg.RunConfig, out: str | None) -> Path:
    """Where a comparison lives: ``out``, or ``RUN.DIR/RUN.NAME-compare``."""
    return local(out, "--out") if out else local(config.run.dir, "run.dir") / f"{config.run.name}-compare"


def entries_of(name: str, specs: Sequence[str], seeds: int, words: Sequence[str], out: str | None) -> list[Entry]:
    """The runs of config ``name`` with each loss and each of ``seeds`` seeds from ``run.seed`` on, seeds innermost.

    Args:
      specs: ``LOSS`` or ``LOSS@key=value@key=value``, the values being options of that loss alone. LOSS is a name, an
        import path or ``path/to/file.py:function``.
      words: ``key=value`` changes that hold for all.

    Raises:
      UserError: no loss, no seed, two losses that would be the same run, or a config that is not valid.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least one seed is needed")
    base = cfg.load(name, words)
    where = folder(base, out)
    entries: list[Entry] = []
    owners: dict[str, str] = {}
    for spec in specs:
        loss, *options = spec.split("@")
        if not loss:
            raise UserError(f"--losses {','.join(specs)}: a name is empty; write e.g. grpo,dr_grpo,my_file.py:my_loss")
        slug = _slug(spec)
        if slug in owners:
            raise UserError(f"--losses: {owners[slug]} and {spec} would be the same run {slug}; leave one out")
        owners[slug] = spec
        changes = [f"loss.name={json.dumps(loss)}", *(f"loss.options.{option}" for option in options)]
        for seed in range(base.run.seed, base.run.seed + seeds):
            place = [f"run.dir={json.dumps(str(where))}", f"run.name={slug}-seed{seed}", f"run.seed={seed}"]
            entries.append(Entry(spec, seed, cfg.load(name, [*words, *changes, *place])))
    return entries


def _slug(spec: str) -> str:
    """A folder name: of a path its last part, and only characters that run.name may have."""
    loss, *options = spec.split("@")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "@".join([loss.rsplit("/", 1)[-1], *options])).strip("-.") or "loss"


def check(entries: Sequence[Entry]) -> list[Objective | None]:
    """Every loss found and tried on a tiny batch, every folder free or resumable, before anything trains.

    Returns the objectives in order, one for each ``Entry.loss``; None for a supervised loss. Raises UserError.
    """
    found: dict[str, Objective | None] = {}
    for item in entries:
        if item.loss not in found:
            found[item.loss] = None
            if isinstance(item.config, cfg.GrpoConfig):
                found[item.loss] = objective_of(item.config)
            else:
                sft.find_loss(item.config)
        RunFolder(item.config)
    return list(found.values())


def train_all(entries: Sequence[Entry]) -> list[str] | None:
    """Trains what is not trained yet. Returns a message for each run that failed while training, or None if the user
    stopped it.

    A loss that diverges is a result of the comparison: the others go on. A run that fails before its first step fails
    for a reason that the next one has too, and that is raised.
    """
    failures: list[str] = []
    spent: list[float] = []
    train = _ALGORITHMS[entries[0].config.algorithm].train
    open_runs = sum(RunFolder(item.config).summary() is None for item in entries)
    for number, item in enumerate(entries, 1):
        fresh = RunFolder(item.config).summary() is None
        left = sum(spent) / len(spent) * (open_runs - len(spent)) if spent else None
        eta = f", about {max(1, round(left / 60))} min to go" if fresh and left is not None else ""
        console.rule(f"run {number} of {len(entries)}: {item.path.name}{eta}")
        clock = time.monotonic()
        try:
            done = train(item.config)
        except UserError as error:
            if not has_steps(item.path):
                raise
            failures.append(f"{item.path.name}: {error}")
            console.print(f"{failures[-1]}\nthe other runs go on", markup=False)
        else:
            if done is None:
                return None
        # The programs of this run belong to its loss; nothing later can use them.
        jax.clear_caches()
        gc.collect()
        if fresh:
            spent.append(time.monotonic() - clock)
    return failures


def has_steps(path: Path) -> bool:
    """Whether a run has recorded anything."""
    metrics = path / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0
