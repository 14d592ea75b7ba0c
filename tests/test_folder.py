"""A run's folder: whose files it may delete, who may write it, and what is kept of its lines."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from helpers import grpo_words, sft_words
from test_checkpoint import CONFIG, fresh

from jaxreason import checkpoint, cli, weights
from jaxreason import config as cfg
from jaxreason.compare.read import read_run
from jaxreason.errors import UserError
from jaxreason.locks import Owner
from jaxreason.train.folder import RunFolder, keep_lines

ROOT = Path(__file__).resolve().parents[1]


def folder(root: Path, *words: str) -> RunFolder:
    return RunFolder(cfg.load("sft", sft_words(root, *words)))


# ---- what is deleted


def test_only_what_says_so_is_removed_as_unfinished(tmp_path):
    """A directory of photos, named like a step; a web application's manifest; and a step whose writing was cut off."""
    photos, web, cut = (tmp_path / name for name in ("20240101", "20240102", "00000007"))
    for path in (photos, web, cut):
        path.mkdir()
        (path / "photo.jpg").write_bytes(b"x")
    (web / checkpoint.MANIFEST).write_text('{"name": "app"}')
    (cut / checkpoint.UNFINISHED).touch()
    store = checkpoint.Checkpoints(tmp_path, keep=1)
    assert store.remove_unfinished() == [cut]
    for step in (1, 2, 3):
        store.save(fresh(step), {}, CONFIG)
    store.wait()
    assert checkpoint.steps(tmp_path) == [3]
    assert (photos / "photo.jpg").exists() and (web / "photo.jpg").exists()


def test_a_checkpoint_is_not_written_over_somebody_s_directory(tmp_path):
    (tmp_path / "00000001").mkdir()
    (tmp_path / "00000001" / "photo.jpg").write_bytes(b"x")
    (tmp_path / "00000002").mkdir()  # nothing in it is anybody's
    store = checkpoint.Checkpoints(tmp_path, keep=1)
    with pytest.raises(UserError, match=r"00000001 is in the way of this run's checkpoint.*move it away"):
        store.save(fresh(1), {}, CONFIG)
    assert (tmp_path / "00000001" / "photo.jpg").exists()
    store.save(fresh(2), {}, CONFIG)
    store.wait()
    assert checkpoint.steps(tmp_path) == [2]


def test_a_save_that_was_killed_is_known_by_its_mark(tmp_path):
    """Killed while the arrays are written, and while the files of a finished step are deleted."""
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from test_checkpoint import CONFIG, fresh
        from jaxreason import checkpoint
        where, when = Path(sys.argv[1]), sys.argv[2]
        store = checkpoint.Checkpoints(where, keep=1)
        die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        if when == "write":
            checkpoint._digests = die
        else:
            store.save(fresh(1), {}, CONFIG)
            store.wait()
            checkpoint.shutil.rmtree = die
        store.save(fresh(2), {}, CONFIG)
        store.wait()
    """)
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    for when, left, kept in (("write", ["00000002"], []), ("delete", ["00000001"], [2])):
        where = tmp_path / when
        done = subprocess.run([sys.executable, "-c", script, str(where), when], env=env, capture_output=True, text=True)
        assert done.returncode == -9, done.stderr
        assert [path.name for path in checkpoint.unfinished(where)] == left and checkpoint.steps(where) == kept
        checkpoint.Checkpoints(where, keep=1).remove_unfinished()
        assert sorted(path.name for path in where.iterdir()) == [f"{step:08d}" for step in kept]


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", ""])
def test_a_run_s_name_is_a_folder_below_run_dir(name, tmp_path):
    with pytest.raises(UserError, match="run.name"):
        cfg.load("sft", sft_words(tmp_path, f"run.name={name}"))


def test_a_folder_that_is_not_a_run_s_is_refused(tmp_path):
    (tmp_path / "sft").mkdir()
    assert folder(tmp_path).resume is None  # an empty one may be
    (tmp_path / "sft" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not the folder of a run .*thesis.tex"):
        folder(tmp_path)
    (tmp_path / "sft" / "config.yaml").write_text("server: 8080\n")
    with pytest.raises(UserError, match="cannot be resumed: .*another program's"):
        folder(tmp_path)
    (tmp_path / "sft" / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cannot be resumed: .*config.yaml.*not valid YAML"):
        folder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; set run.name"):
        folder(tmp_path, "run.name=file")
    assert (tmp_path / "sft" / "thesis.tex").read_text() == "x"


def test_another_config_s_folder_is_refused_also_before_its_first_checkpoint(tmp_path):
    first = folder(tmp_path)
    first.start(None)
    (first.path / "metrics.jsonl").write_text('{"step": 1}\n')
    first.release()
    assert folder(tmp_path).resume is None
    with pytest.raises(UserError, match="holds a run of another config:\n  optimizer.b2: 0.95 there, 0.5 now"):
        folder(tmp_path, "optimizer.b2=0.5")
    assert (first.path / "metrics.jsonl").exists()


# ---- who writes it


def test_a_second_process_is_refused_by_the_name_of_the_first(tmp_path):
    """Its owner's number, also where it was killed: then the lock is free."""
    script = "import sys, time; from pathlib import Path; from jaxreason.locks import Owner; owner = Owner(Path(sys.argv[1])); "
    script += "print('mine', flush=True); time.sleep(60)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match=rf"is being written by process {process.pid} on .*set run.name"):
        Owner(tmp_path)
    process.kill()
    process.wait()
    owner = Owner(tmp_path)
    assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
    owner.release()
    assert (tmp_path / "lock").read_text() == ""
    Owner(tmp_path).release()


def test_two_runs_in_one_folder_do_not_interleave(tmp_path, monkeypatch, capsys):
    """The second one finds the folder taken, ends with status 2 and changes nothing; then the first goes on."""
    started, others = folder(tmp_path), []
    started.start(None)
    (started.path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert cli.train(["--config", "sft", *sft_words(tmp_path)]) == 2
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
    assert (started.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    started.release()
    del others


def test_what_was_found_before_another_run_ended_is_not_written_over(tmp_path):
    late = folder(tmp_path)
    early = folder(tmp_path)
    early.start(None)
    store = checkpoint.Checkpoints(early.checkpoints, keep=1)
    store.save(fresh(8), {}, CONFIG)
    store.wait()
    early.finish({"step": 8})
    early.release()
    with pytest.raises(UserError, match="another process trained here meanwhile"):
        late.start(None)
    assert early.summary() == {"step": 8}


# ---- what is kept of its lines


def test_lines_are_kept_whole_whatever_is_in_them(tmp_path, capsys):
    """Characters that end a line for Python's str, but not in JSONL; and a last line that a kill cut short."""
    path = tmp_path / "samples.jsonl"
    texts = ["a\u2028b", "c\u2029d", "e\u0085f", "g\x0ch\x1ci", "\r", "plain"]
    lines = [json.dumps({"step": i, "completion": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    path.write_bytes(("\n".join(lines) + '\n{"step": 3, "comp').encode())
    keep_lines(path, 4)
    assert path.read_bytes() == ("\n".join(lines[:5]) + "\n").encode()
    assert not list(tmp_path.glob("*.damaged")) and capsys.readouterr().out == ""


@pytest.mark.parametrize("bad", [b"{", b"\0\0\0", b"\xff\xfe", b'"text"', b'{"step": "one"}', b"[" * 100000, b"{}"])
def test_damaged_lines_are_named_and_put_aside(bad, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 2}\n{"step": 3}\n')
    keep_lines(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert f"{path}, line 2: damaged" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == bad + b"\n"


def test_step_0_is_logged_once(tmp_path, monkeypatch):
    """A GRPO run that evaluates first, is cut back to its first checkpoint, and resumes."""
    from jaxreason.rl import held_out

    monkeypatch.setattr(held_out.HeldOut, "__call__", lambda self, state: {"eval_accuracy": 0.25})
    words = grpo_words(tmp_path, "eval.problems=4", "train.steps=1", "train.save_every=1")
    assert cli.train(["--config", "grpo", *words]) == 0
    run = tmp_path / "grpo"
    (run / "summary.json").unlink()
    assert cli.train(["--config", "grpo", *words]) == 0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().split("\n") if line] == [0, 1]


def test_a_comparison_reads_text_with_other_line_ends(tmp_path):
    (tmp_path / "config.yaml").write_text("algorithm: grpo\nrun: {seed: 0}\nloss: {name: grpo}\n")
    line = json.dumps({"step": 1, "loss": 2.0, "note": "a\u2028b\u0085c"}, ensure_ascii=False)
    (tmp_path / "metrics.jsonl").write_text(line + "\n" + line[:20])
    assert read_run(tmp_path).records == [{"step": 1, "loss": 2.0, "note": "a\u2028b\u0085c"}]
    (tmp_path / "samples.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="samples.jsonl: not all of its last lines"):
        read_run(tmp_path)


# ---- readers of a run that is training


def test_a_step_that_is_read_is_not_deleted(tmp_path):
    run = tmp_path / "run"
    store = checkpoint.Checkpoints(run / "checkpoints", keep=1)
    store.save(fresh(1), {}, CONFIG)
    store.wait()
    source = weights.locate(str(run))
    for step in (2, 3):
        store.save(fresh(step), {}, CONFIG)
        store.wait()
    assert checkpoint.steps(store.directory) == [1, 3]
    assert checkpoint.verify(source.path)
    del source
    store.save(fresh(4), {}, CONFIG)
    store.wait()
    assert checkpoint.steps(store.directory) == [4]


def test_readers_of_a_live_run_always_find_a_whole_checkpoint(tmp_path):
    """Forty readings or more while a run saves as fast as it can and keeps one step."""
    run, done = tmp_path / "run", threading.Event()
    store = checkpoint.Checkpoints(run / "checkpoints", keep=1)
    store.save(fresh(1), {}, CONFIG)
    store.wait()
    state = fresh(2)

    def save():
        step = 2
        while not done.is_set():
            store.save(state.__class__(state.step * 0 + step, state.params, state.frozen, state.opt_state), {}, CONFIG)
            store.wait()
            step += 1

    writer = threading.Thread(target=save)
    writer.start()
    try:
        seen, read, until = set(), 0, time.monotonic() + 60
        while (read < 40 or len(seen) < 4) and time.monotonic() < until:
            read += 1
            source = weights.locate(str(run))
            assert source.config("float32", "float32").arch == CONFIG.arch and checkpoint.verify(source.path)
            seen.add(source.path.name)
            time.sleep(0.01)
    finally:
        done.set()
        writer.join()
    assert len(seen) > 3 and read >= 40


def test_a_step_that_goes_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch):
    store = checkpoint.Checkpoints(tmp_path, keep=1)
    store.save(fresh(1), {}, CONFIG)
    store.wait()
    path = tmp_path / "00000001"
    monkeypatch.setattr(checkpoint, "_digests", lambda *args: checkpoint._remove(path) and (path / "x").stat())
    with pytest.raises(UserError, match="was deleted while it was read: its run goes on.*run the same command again"):
        checkpoint.verify(path)
    with pytest.raises(UserError, match="it is being written or deleted, or that was cut off; the finished steps are none"):
        checkpoint.verify(path)


def test_a_finished_run_whose_lines_are_gone_still_writes_its_summary(tmp_path):
    words = sft_words(tmp_path, "train.steps=1")
    assert cli.train(["--config", "sft", *words]) == 0
    run = tmp_path / "sft"
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    assert cli.train(["--config", "sft", *words]) == 0
    assert json.loads((run / "summary.json").read_text())["step"] == 1
