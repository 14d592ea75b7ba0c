"""Whole runs: resume is bitwise, wrong input is one message and exit status 2, nothing is half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import final_params, sft_words

from jaxreason import checkpoint, cli
from jaxreason.train import not_finite

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling is what takes the time


def command(*words):
    return [sys.executable, str(ROOT / "scripts" / "train.py"), *words]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 8 steps that nothing disturbed."""
    root = tmp_path_factory.mktemp("straight")
    done = subprocess.run(command("--config", "sft", *sft_words(root)), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "sft"


def test_a_run_leaves_what_it_promises(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(np.isfinite(line["loss"]) and line["tokens"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert json.loads((straight / "summary.json").read_text())["step"] == 8
    report = json.loads((straight / "data_report.json").read_text())
    assert report["sources"][0]["rows"] == 300
    assert (straight / "config.yaml").is_file() and (straight / "tokenizer" / "tokenizer.json").is_file()


def test_kill_9_and_the_same_command_again_ends_bitwise_equal(straight, tmp_path):
    words = ["--config", "sft", *sft_words(tmp_path, "train.save_every=2")]
    process = subprocess.Popen(command(*words), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not checkpoint.steps(tmp_path / "sft" / "checkpoints") and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.steps(tmp_path / "sft" / "checkpoints")[-1] < 8, "killed too late to test anything"
    again = subprocess.run(command(*words), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stdout
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "sft"), final_params(straight))
    steps = [json.loads(line)["step"] for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_a_finished_run_is_not_run_again(straight, capsys):
    before = (straight / "summary.json").read_bytes()
    assert cli.train(["--config", "sft", *sft_words(straight.parent)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert (straight / "summary.json").read_bytes() == before


def refuse(argv, capsys, function=cli.train):
    assert function(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_another_config_in_the_same_folder_is_refused_by_key(straight, capsys):
    error = refuse(["--config", "sft", *sft_words(straight.parent, "optimizer.b2=0.5")], capsys)
    assert "optimizer.b2: 0.95 there, 0.5 now" in error


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--config", "nope"], "--config nope: no such config"),
        (["--config", "sft", "optimizer.learning_rat=1"], "did you mean optimizer.learning_rate?"),
        (["--config", "sft", "loss.name=nlll"], "'nlll' is unknown"),
        (["--config", "sft", "loss.name=grpo"], "loss grpo is a policy loss"),
        (["--config", "sft", "model.preset=llama4"], "model.preset 'llama4' is unknown"),
        (["--config", "grpo", "model.weights=runs/sfft"], "python scripts/train.py --config sfft"),
        (["--config", "grpo", "train.updates_per_rollout=3", "train.minibatches=2"], "not a multiple"),
        (["--config", "grpo", "data.packing=true"], "data.packing is a key of algorithm sft"),
        (["--config", "sft", "mesh.fsdp=3", "mesh.data=3"], "needs 9 devices"),
        (["--config", "sft", "train.microbatch_size=3"], "does not divide"),
    ],
)
def test_wrong_input_is_one_message(words, part, tmp_path, capsys):
    extra = sft_words(tmp_path) if words[1] == "sft" else [f"run.dir={tmp_path}"]
    named = {word.split("=")[0] for word in words}
    error = refuse([*words[:2], *(w for w in extra if w.split("=")[0] not in named), *words[2:]], capsys)
    assert part in error
    assert not (tmp_path / "sft").exists() and not (tmp_path / "grpo").exists()


def test_bad_data_files_name_file_and_line(tmp_path, capsys):
    good = json.dumps({"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]})
    cut, empty = tmp_path / "cut.jsonl", tmp_path / "empty.jsonl"
    cut.write_text(good + "\n" + good[:40])
    empty.write_text("")
    for path, part in ((cut, f"{cut}, line 2"), (empty, str(empty))):
        words = [w for w in sft_words(tmp_path / "runs") if not w.startswith("data.max_rows")]
        assert part in refuse(["--config", "sft", *words, f"data.source={path}"], capsys)
    assert not (tmp_path / "runs" / "sft").exists()


def test_a_damaged_checkpoint_is_refused(straight, tmp_path, capsys):
    run = tmp_path / "sft"
    subprocess.run(["cp", "-r", str(straight), str(run)], check=True)
    (run / "summary.json").unlink()
    victim = next(p for p in (run / "checkpoints" / "00000008" / "params").rglob("d/*") if p.is_file())
    victim.write_bytes(victim.read_bytes()[:-3])
    assert victim.name in refuse(["to-hf", str(run), str(tmp_path / "out")], capsys, cli.convert)
    assert not (tmp_path / "out").exists()
    assert "the checkpoint is damaged" in refuse(["--config", "sft", *sft_words(tmp_path)], capsys)


def test_sigterm_saves_and_exits_75(tmp_path):
    words = ["--config", "sft", *sft_words(tmp_path, "train.steps=4000")]
    process = subprocess.Popen(command(*words), cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "sft" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == cli.STOPPED == 75 and "the same command goes on" in out
    step = checkpoint.steps(tmp_path / "sft" / "checkpoints")[-1]
    assert step == len(metrics.read_text().splitlines())
    assert not (tmp_path / "sft" / "summary.json").exists()


def test_nan_stops_the_run_with_step_and_parameter(tmp_path, capsys):
    words = sft_words(tmp_path, "optimizer.learning_rate=1e38", "optimizer.schedule=constant", "optimizer.warmup_steps=0")
    error = refuse(["--config", "sft", *words], capsys)
    assert "step 2: loss is" in error and "not finite" in error and "lower optimizer.learning_rate" in error
    assert not checkpoint.steps(tmp_path / "sft" / "checkpoints")
    assert not_finite.updates(tmp_path / "sft") == [2] and "--update 2" in error
