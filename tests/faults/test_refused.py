"""What the operating system refuses is one line and exit status 2, and what was done before it is kept."""

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from harness import ENV, ROOT
from helpers import sft_words

from jaxreason import checkpoint, cli, distributed
from jaxreason.data.store import TokenFile
from jaxreason.errors import UserError, explain
from jaxreason.paths import expanded, local
from jaxreason.train.log import Log


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOENT, errno.EIO, errno.ENOTTY])
def test_a_refusal_is_one_line_with_the_path_and_a_fix(code, capsys):
    @cli.command(lambda parser: None)
    def fails(args):
        raise OSError(code, os.strerror(code), "/data/runs/a", None, "/data/runs/b")

    assert fails([]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: /data/runs/a -> /data/runs/b: {os.strerror(code)}; ") and said.count("\n") == 1
    assert explain(OSError("the hub\nis away")) == "the hub is away; mend that and run the same command again"


def test_a_process_of_several_says_it_too(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    cluster = distributed.Cluster("test", 2, 1, {})
    with pytest.raises(SystemExit) as caught, distributed.joined(cluster):
        raise PermissionError(errno.EACCES, "Permission denied", "/data")
    assert caught.value.code == 2 and "process 1: error: /data: Permission denied; give a place" in capsys.readouterr().err


def test_a_step_whose_line_cannot_be_written_is_saved(tmp_path, monkeypatch, capsys):
    """The disk is full at step 5 of 8: the checkpoint of step 5 is there, from which the same command goes on."""
    write = Log.write

    def full(self, step, record):
        if step == 5:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
        write(self, step, record)

    monkeypatch.setattr(Log, "write", full)
    assert cli.train(["--config", "sft", *sft_words(tmp_path)]) == 2
    assert "metrics.jsonl: No space left on device; free some space" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "sft" / "checkpoints") == [5]


def test_a_token_file_that_was_cut_is_named(tmp_path):
    """It was memory-mapped, and the system ended the process with SIGBUS."""
    path = tmp_path / "tokens.bin"
    np.arange(5000, dtype=np.uint16).tofile(path)
    tokens = TokenFile(path, np.dtype(np.uint16))
    assert tokens[10:13].tolist() == [10, 11, 12] and tokens[0:0].tolist() == []
    os.truncate(path, 4096)
    assert tokens[2047:2048].tolist() == [2047]
    with pytest.raises(UserError, match="tokens.bin: was cut while it was read"):
        tokens[2047:2049]


def test_home_is_put_in_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == local("~/a", "run.dir") == tmp_path / "a"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1?", "completion": "2"}\n' * 20)
    words = [w for w in sft_words(tmp_path) if not w.startswith(("run.dir", "data.max_rows", "data.cache_dir"))]
    words += ["run.dir=~/runs", "data.cache_dir=~/cache", "data.source=~/rows.jsonl", "--dry-run"]
    monkeypatch.chdir(tmp_path)
    assert cli.train(["--config", "sft", *words]) == 0
    assert (tmp_path / "cache" / "tokens").is_dir() and not (tmp_path / "~").exists()
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    (tmp_path / "runs" / "sft" / "theirs").touch()
    capsys.readouterr()
    assert cli.train(["--config", "sft", *words]) == 2 and f"{tmp_path}/runs/sft is not the folder" in capsys.readouterr().err
    for command in (["to-hf", "~/none", "x"], ["from-hf", "~/none", "x"]):
        assert cli.convert(command) == 2 and "~" not in capsys.readouterr().err.replace("~/none", "", 1)


@pytest.mark.parametrize("text", ["~nobody-of-that-name/x", "a\0b", "a\ud800b"])
def test_what_no_path_can_be_is_refused(text):
    with pytest.raises(UserError, match="run.dir .*(no such home|zero byte|surrogate)"):
        local(text, "run.dir")


@pytest.mark.parametrize("url", ["gs://bucket/runs", "s3://bucket/runs", "hf://x"])
def test_an_object_store_is_refused_before_anything_is_done(url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.train(["--config", "sft", *sft_words(tmp_path), f"run.dir={url}"]) == 2
    said = capsys.readouterr().err
    assert f"run.dir {url}" in said and "mount the bucket" in said
    assert cli.convert(["to-hf", url, "out"]) == cli.convert(["from-hf", url, "out"]) == 2
    assert cli.evaluate(["--model", "x", "--task", "embedded:arithmetic", "--out", url]) == 2
    assert not list(tmp_path.iterdir())


def test_a_place_for_results_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    out = tmp_path / "file" / "found"
    out.parent.touch()
    assert cli.evaluate(["--model", "not-there", "--task", "embedded:arithmetic", "--out", str(out)]) == 2
    assert f"{out}: Not a directory" in capsys.readouterr().err


def test_without_a_home_and_a_user_the_caches_are_asked_for():
    code = (
        "import os, pwd, sys\nfrom pathlib import Path\nfrom jaxreason import cli\nos.environ.pop('HOME', None)\n"
        "pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))\nsys.exit(cli.train(sys.argv[1:]))"
    )
    environment = {k: v for k, v in ENV.items() if k not in ("JAXREASON_CACHE", "JAX_COMPILATION_CACHE_DIR")}
    command = [str(Path(os.sys.executable)), "-c", code, "--config", "sft", "run.dir=/nowhere"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there is no such home directory (is HOME set?)" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
