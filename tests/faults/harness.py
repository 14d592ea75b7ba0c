"""Kills, damaged files and long runs, counted. ``scripts/faults.py`` does them at length, the tests a few of them."""

import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from helpers import final_params, grpo_words, sft_words

from jaxreason import checkpoint, hf, origin
from jaxreason import config as cfg
from jaxreason.convert import to_hf
from jaxreason.data.store import open_store
from jaxreason.data.tokenizer import load
from jaxreason.errors import UserError
from jaxreason.report.run import write_run_report
from jaxreason.sharding import make_mesh
from jaxreason.train.folder import RunFolder
from jaxreason.weights import locate

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(script: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / script), *words]
    return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> None:
    """Waits for a process that must end well."""
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-2000:]


# ---- kills


def equal(a: Any, b: Any) -> bool:
    """Whether two trees of arrays are the same bit for bit."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))


def kinds(root: Path) -> dict[str, tuple[Callable[[Path], list[str]], Callable[[Path], Any]]]:
    """What is killed: its command for a folder of its own, and what it leaves there. ``root / "sft"`` is a finished run."""
    run = root / "sft"

    def export_of(folder: Path) -> dict:
        left = [path.name for path in folder.iterdir() if path.name != "out"]
        assert not left, f"left behind: {left}"
        return {path.name: np.frombuffer(path.read_bytes(), np.uint8) for path in (folder / "out").iterdir()}

    def found(folder: Path) -> dict:
        return {"text": np.frombuffer((folder / "found" / "answers.jsonl").read_bytes(), np.uint8)}

    task = ["--model", str(run), "--task", "embedded:arithmetic", "problems=4", "max_completion_tokens=8"]
    return {
        "sft": (lambda folder: ["train.py", "--config", "sft", *sft_words(folder, "train.save_every=1")],
                lambda folder: final_params(folder / "sft")),
        "grpo": (lambda folder: ["train.py", "--config", "grpo", *grpo_words(folder, "train.save_every=1")],
                 lambda folder: final_params(folder / "grpo")),
        "to-hf": (lambda folder: ["convert.py", "to-hf", str(run), str(folder / "out")], export_of),
        "evaluate": (lambda folder: ["evaluate.py", *task, "--out", str(folder / "found")], found),
    }  # fmt: skip


def kill(root: Path, kind: str, count: int, seed: int = 0) -> Counter:
    """Kills ``kind`` ``count`` times at random moments and starts it again, till it ends; what it leaves is compared.

    Counts ``kills``, ``ends`` and ``differ``. An export that was there when it was killed is not made again.
    """
    rng, counted = random.Random(seed), Counter()
    command, left = kinds(root)[kind]

    def folder(name: str) -> Path:
        place = root / f"{kind}-{name}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    began, place = time.monotonic(), folder("straight")
    ended(start(*command(place)))
    seconds, wanted = time.monotonic() - began, left(place)
    while counted["kills"] < count:
        place = folder("killed")
        for _ in range(min(4, count - counted["kills"])):
            process = start(*command(place))
            try:
                process.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                counted["kills"] += 1
        if not (place / "out").exists():
            ended(start(*command(place)))
        counted["ends"] += 1
        counted["differ"] += not equal(left(place), wanted)
    return counted


# ---- damaged files


def flip(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flip, "cut": lambda content: content[: len(content) // 2], "emptied": lambda content: b"",
    "longer": lambda content: content + b"\n{",
}  # fmt: skip
LOGS = ("metrics.jsonl", "samples.jsonl", "data_report.json", "origin.json", "summary.json", "lock", "README.md")


def read_run(run: Path) -> Any:
    """What a resume, an export, an evaluation and a report read of a run."""
    saved = cfg.read_run(run / "config.yaml")
    config = cfg.build(saved | {"run": saved["run"] | {"dir": str(run.parent)}})
    folder = RunFolder(config)
    source = locate(str(run))
    mesh = make_mesh(cfg.Mesh(), jax.devices()[:1])
    params = numpy_of(source.params(source.config("float32", "float32"), mesh))
    state = json.loads((source.path / "data.json").read_bytes())
    write_run_report(run, None, run.parent / "report.html")
    ids = load(source.tokenizer).encode("1 + 1 = <think>")
    return params, (folder.resume, cfg.dump(config), json.dumps(state), ids, folder.summary(), len(origin.read_origins(run)))


def numpy_of(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def read_export(directory: Path) -> Any:
    """What is read of an exported directory."""
    params, config = hf.load(directory)
    return numpy_of(params), (config, load(directory).encode("1 + 1 = <think>"))


def read_cache(cache: Path) -> Any:
    """What is read of tokenized data; None where it would be made again."""
    (path,) = (cache / "tokens").iterdir()
    store = open_store(path)
    return None if store is None else (np.concatenate([store.example(i) for i in range(len(store.lengths))]), store.meta)


@dataclasses.dataclass
class Damage:
    """What became of damaged files: counts by outcome, and the files of which the damage was not seen."""

    outcomes: Counter
    unseen: list[str]


def damage(folder: Path, read: Callable[[Path], Any], only: int | None = None, seed: int = 0) -> Damage:
    """Every file of ``folder`` × every damage, or ``only`` so many of them: named, made again, harmless, a log, or unseen."""
    wanted, found = read(folder), Damage(Counter(), [])
    kept = folder.parent / f"{folder.name}-kept"
    shutil.copytree(folder, kept)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    cases = [(name, kind) for name in files for kind in DAMAGES]
    if only is not None:
        cases = random.Random(seed).sample(cases, only)
    for name, kind in cases:
        before = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).write_bytes(DAMAGES[kind](before))
        try:
            now = read(folder)
        except (UserError, OSError):
            outcome = "named"
        except Exception as error:
            outcome = f"traceback {type(error).__name__}"
            found.unseen.append(f"{name} {kind}: {type(error).__name__}: {error}"[:200])
        else:
            kinds_of = (("made again", now is None), ("harmless", now and same(now, wanted)), ("a log", name.name in LOGS))
            outcome = next((kind for kind, holds in kinds_of if holds), "unseen")
            if outcome == "unseen":
                found.unseen.append(f"{name} {kind}")
        found.outcomes[outcome] += 1
        if not (folder / name).parent.exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(kept, folder)
        (folder / name).write_bytes(before)
    shutil.rmtree(kept)
    return found


def same(a: Any, b: Any) -> bool:
    return equal(a[0], b[0]) and a[1] == b[1]


def finished(root: Path) -> tuple[Path, Path, Path]:
    """A finished run, its token cache and its export."""
    ended(start("train.py", "--config", "sft", *sft_words(root, "train.save_every=4")))
    to_hf(str(root / "sft"), str(root / "export"), None)
    return root / "sft", root / "cache", root / "export"


# ---- long runs


@dataclasses.dataclass(frozen=True)
class Use:
    """What a process and its children hold."""

    step: int
    mib: float
    files: int
    threads: int
    processes: int


def use_of(pid: int, step: int) -> Use:
    """Of a process and of what it started, as /proc says."""
    every = [pid]
    for number in every:
        for task in Path(f"/proc/{number}/task").glob("*"):
            every += [int(child) for child in (task / "children").read_text().split()]
    status = [dict(line.split(":", 1) for line in Path(f"/proc/{p}/status").read_text().splitlines()) for p in every]
    files = sum(len(list(Path(f"/proc/{p}/fd").iterdir())) for p in every)
    mib = sum(int(one["VmRSS"].split()[0]) for one in status) / 1024
    return Use(step, mib, files, sum(int(one["Threads"]) for one in status), len(every))


def watch(root: Path, steps: int, every: float = 0.5) -> list[Use]:
    """A GRPO run of ``steps`` steps that saves every ten, and what it held meanwhile."""
    words = grpo_words(root, f"train.steps={steps}", "train.save_every=10", "rollout.max_completion_tokens=8")
    process, log, found = start("train.py", "--config", "grpo", *words), root / "grpo" / "metrics.jsonl", []
    while process.poll() is None:
        time.sleep(every)
        step = log.read_bytes().count(b"\n") if log.exists() else 0
        if step:
            try:
                found.append(use_of(process.pid, step))
            except (OSError, KeyError):
                continue  # it ended meanwhile
    ended(process)
    assert checkpoint.steps(root / "grpo" / "checkpoints")[-1] == steps
    return found


def ends_of(uses: list[Use], steps: int) -> tuple[Use, Use]:
    """What was held at the middle of the samples of the second and third tenth of the steps, and of the last fifth.

    A save opens files for a moment; what leaks stays.
    """
    def middle(part: list[Use]) -> Use:
        names = ("mib", "files", "threads", "processes")
        return Use(part[-1].step, *(statistics.median_low([getattr(use, name) for use in part]) for name in names))

    early = [use for use in uses if steps * 0.1 <= use.step <= steps * 0.3]
    late = [use for use in uses if steps * 0.8 <= use.step < steps]  # after the last step it lets go of everything
    return middle(early or uses[:1]), middle(late or uses[-1:])


def is_flat(early: Use, late: Use) -> bool:
    """Nothing that counts grew, and memory by no more than what allocators keep (3 %, at least 30 MiB)."""
    slack = max(30.0, 0.03 * early.mib)
    counts = all(getattr(late, name) <= getattr(early, name) + 2 for name in ("files", "threads", "processes"))
    return counts and late.mib <= early.mib + slack
