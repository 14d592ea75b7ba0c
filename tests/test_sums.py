"""Every file that is read again is known by its hash: a flipped bit, a cut and a missing file are named or harmless."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import data_helpers
import jax
import numpy as np
import pytest
import yaml
from helpers import sft_words
from test_checkpoint import CONFIG
from test_hf import random_params, tiny

from jaxreason import checkpoint, cli, convert, hf, model, weights
from jaxreason import config as cfg
from jaxreason.config.run import with_defaults
from jaxreason.convert import from_hf
from jaxreason.data.encode import Encoded
from jaxreason.data.pipeline import prepare
from jaxreason.data.store import Writer, open_store
from jaxreason.data.tokenizer import load
from jaxreason.errors import UserError
from jaxreason.locks import Partial

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}


def flip(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES = {
    "flipped": flip, "cut": lambda content: content[: len(content) // 2], "emptied": lambda content: b"",
    "longer": lambda content: content + b"\n{",
}  # fmt: skip


def damaged(path: Path, kind: str):
    """A context in which the file is damaged."""

    class Damage:
        def __enter__(self):
            self.content = path.read_bytes()
            path.write_bytes(DAMAGES[kind](self.content))

        def __exit__(self, *error):
            path.write_bytes(self.content)

    return Damage()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An exported directory in shards, and the run that it becomes."""
    root = tmp_path_factory.mktemp("made")
    config = model.make_config(vocab_size=400, **{k: getattr(CONFIG.arch, k) for k in (
        "embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")}, stop_ids=(3,))  # fmt: skip
    tokenizer = data_helpers.llama("{{ bos_token }}{{ messages[0].content }}")
    hf.save(random_params(config), config, root / "hf", "float32", tokenizer, shard_bytes=40_000)
    from_hf(str(root / "hf"), str(root / "run"))
    return root


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_file_of_an_export_is_checked(kind, made):
    read = lambda: (hf.load(made / "hf"), load(made / "hf"))  # noqa: E731
    read()
    names = {path.name for path in (made / "hf").iterdir()}
    assert {"SHA256SUMS", "config.json", "generation_config.json", "tokenizer.json", "README.md"} < names and len(names) > 7
    for name in sorted(names - {"README.md"}):  # which nothing reads
        with damaged(made / "hf" / name, kind), pytest.raises(UserError, match="SHA256SUMS"):
            read()
    read()


def test_sums_are_what_sha256sum_checks(made):
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=made / "hf", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK\n") == len(list((made / "hf").iterdir())) - 1


def test_a_file_that_is_missing_or_added_is_named(made, tmp_path):
    shutil.copytree(made / "hf", tmp_path / "hf")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[0]
    shutil.copy(shard, tmp_path / "hf" / "extra.safetensors")
    with pytest.raises(UserError, match="extra.safetensors: not listed in SHA256SUMS; .*remove SHA256SUMS"):
        hf.load(tmp_path / "hf")
    (tmp_path / "hf" / "extra.safetensors").unlink()
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: missing"):
        hf.load(tmp_path / "hf")
    (tmp_path / "hf" / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=f"{shard.name}: no such file"):
        hf.load(tmp_path / "hf")


def test_sums_of_a_tokenizer_say_nothing_about_weights_that_share_its_directory(made, tmp_path):
    """A model saved by something else, and then a tokenizer by this package: both are read, and the tokenizer is checked."""
    for path in [made / "hf" / "config.json", *(made / "hf").glob("*.safetensors*")]:
        shutil.copy(path, tmp_path)
    load("embedded").save(tmp_path)
    hf.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(flip((tmp_path / "tokenizer.json").read_bytes()))
    with pytest.raises(UserError, match="tokenizer.json: its content is not what was saved"):
        load(tmp_path)


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_file_of_a_run_s_tokenizer_is_checked(kind, made):
    place = made / "run" / "tokenizer"
    assert len(list(place.iterdir())) >= 4
    for path in sorted(place.iterdir()):
        with damaged(path, kind), pytest.raises(UserError, match=path.name):
            load(place)
    load(place)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_model_json_or_manifest_is_one_message(kind, made, tmp_path, capsys):
    step = made / "run" / "checkpoints" / "00000000"
    for name in (checkpoint.MODEL, checkpoint.MANIFEST):
        with damaged(step / name, kind):
            if name == checkpoint.MODEL or kind != "flipped":  # else its entry of model.json may be whole
                with pytest.raises(UserError, match=f"{name}.*delete {step}"):
                    weights.locate(str(made / "run")).config("float32", "float32")
            assert cli.convert(["to-hf", str(made / "run"), str(tmp_path / "out")]) == 2
            assert capsys.readouterr().err.startswith("error: ")
    assert weights.locate(str(made / "run")).config("float32", "float32").arch.embed_dim == CONFIG.arch.embed_dim


@pytest.mark.parametrize("kind", [*DAMAGES, "missing"])
def test_a_damaged_token_cache_is_made_again(kind, tmp_path, capsys):
    rows = data_helpers.write_jsonl(tmp_path / "rows.jsonl", [data_helpers.trace(i) for i in range(30)])
    data = cfg.Data(source=rows, max_length=128, batch_size=2, workers=0, cache_dir=str(tmp_path / "cache"))
    tokenizer = load("embedded")

    def batch():
        return jax.tree.leaves(prepare(data, tokenizer, 0, progress=False).train.batch(0))

    wanted = batch()
    (store,) = (tmp_path / "cache" / "tokens").iterdir()
    names = sorted(path.name for path in store.iterdir())
    assert names == ["SHA256SUMS", "index.npz", "meta.json", "tokens.bin"]
    for name in names:
        if kind == "missing":
            (store / name).unlink()
        else:
            (store / name).write_bytes(DAMAGES[kind]((store / name).read_bytes()))
        jax.tree.map(np.testing.assert_array_equal, batch(), wanted)
        assert "tokenized data are made again" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, batch(), wanted)
    assert "again" not in capsys.readouterr().out


def test_five_hundred_flipped_bits_are_all_found(made, tmp_path, capsys):
    """Of the files of a run's tokenizer, of its newest checkpoint, and of a token cache, one at a time, drawn with a seed."""
    random = np.random.default_rng(13)
    run, cache = made / "run", tmp_path / "tokens" / "key"
    step = run / "checkpoints" / "00000000"
    writer = Writer(cache, 300)
    writer.add(Encoded(*(np.arange(1, 9, dtype=np.int32) for _ in range(5)), rows=8, rejects=[], formats=[]), 0)
    writer.commit({"rows": 8, "rejects": {}, "formats": {"text": 8}})
    kept = {path.name: path.read_bytes() for path in cache.iterdir()}
    found = {"tokenizer": 0, "checkpoint": 0, "cache": 0}

    def flipped(path: Path) -> bytes:
        content = bytearray(path.read_bytes())
        at = int(random.integers(len(content) * 8))
        content[at // 8] ^= 1 << at % 8
        return bytes(content)

    def files(directory: Path) -> list[Path]:
        # SHA256SUMS is one of them; in a manifest there are places that nothing reads.
        whole = (path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
        return sorted(path for path in whole if path.name != checkpoint.MANIFEST)

    for kind, directory, count, read in (
        ("tokenizer", run / "tokenizer", 250, lambda: load(run / "tokenizer")),
        ("checkpoint", step, 130, lambda: checkpoint.verify(step)),
    ):
        for _ in range(count):
            path = files(directory)[int(random.integers(len(files(directory))))]
            content = path.read_bytes()
            path.write_bytes(flipped(path))
            try:
                read()
            except UserError as error:
                found[kind] += str(directory) in str(error)
            path.write_bytes(content)
        read()
    sealed = step / checkpoint.MANIFEST
    content, named = sealed.read_bytes(), 0
    for _ in range(150):  # some change what nothing reads, such as the number of the step; none is a traceback
        sealed.write_bytes(flipped(sealed))
        try:
            checkpoint.verify(step)
            weights.locate(str(run)).config("float32", "float32")
        except UserError:
            named += 1
        sealed.write_bytes(content)
    assert named >= 140
    for _ in range(120):
        path = cache / sorted(kept)[int(random.integers(len(kept)))]
        path.write_bytes(flipped(path))
        found["cache"] += open_store(cache) is None and not cache.exists()
        cache.mkdir(exist_ok=True)
        for name, content in kept.items():
            (cache / name).write_bytes(content)
    assert open_store(cache).example(0).tolist() == [1]
    assert found == {"tokenizer": 250, "checkpoint": 130, "cache": 120}


# ---- older runs


def test_a_run_of_an_older_release_resumes_where_a_newer_one_has_more_keys(tmp_path, capsys):
    """What its config.yaml does not say is the default; a key that it does say otherwise is still refused."""
    words = sft_words(tmp_path, "train.steps=4", "train.save_every=2")
    assert cli.train(["--config", "sft", *words]) == 0
    run = tmp_path / "sft"
    shutil.rmtree(run / "checkpoints" / "00000004")
    (run / "summary.json").unlink()
    old = yaml.safe_load((run / "config.yaml").read_text())
    del old["data"]["trust_special_tokens"], old["teacher"], old["train"]["neftune_alpha"], old["loss"]["options"]
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    capsys.readouterr()
    assert cli.train(["--config", "sft", *words, "data.trust_special_tokens=true"]) == 2
    assert "data.trust_special_tokens: False there, True now" in capsys.readouterr().err
    assert cli.train(["--config", "sft", *words]) == 0
    assert "from step 2" in capsys.readouterr().out


def test_renamed_keys_are_read_by_their_new_name(tmp_path):
    values = yaml.safe_load(cfg.dump(cfg.load("grpo")))
    values["correction"] = values.pop("second_turn") | {"samples": 3}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    found = cfg.read_run(tmp_path / "config.yaml")
    assert found["second_turn"]["samples"] == 3 and "correction" not in found
    whole = yaml.safe_load(cfg.dump(cfg.load("grpo")))
    assert with_defaults(whole, cfg.GrpoConfig) == whole
    assert with_defaults({"run": 5}, cfg.GrpoConfig)["run"] == 5


def test_a_model_card_of_an_older_run_says_what_is_known(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("algorithm: sft\nrun: {name: x}\n")
    convert.to_hf(str(tmp_path / "run"), str(tmp_path / "out"), None)
    assert (tmp_path / "out" / "README.md").is_file()


# ---- what killed processes leave


def test_what_a_killed_export_left_is_removed_by_the_next_one(tmp_path):
    """And what another process is making is not."""
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from jaxreason.locks import Partial
        partial = Partial(Path(sys.argv[1]))
        (partial.path / "model.safetensors").write_bytes(b"x")
        print(partial.path, flush=True)
        time.sleep(60)
    """)
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], env=ENV, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    left, live = (Path(process.stdout.readline().strip()) for process in processes)
    (tmp_path / ".other.0123abcd.partial").mkdir()  # of another target, and so not looked at
    processes[0].kill()
    processes[0].wait()
    config = tiny()
    hf.save(random_params(config), config, tmp_path / "out")
    assert not left.exists() and live.exists() and (tmp_path / ".other.0123abcd.partial").exists()
    assert (tmp_path / "out" / "config.json").exists()
    processes[1].kill()
    processes[1].wait()
    with Partial(tmp_path / "out"):
        assert not live.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0123abcd.partial", "out"]


def test_tokenizing_processes_end_with_a_run_that_was_killed(tmp_path):
    """Killed in the middle of it: no process outlives it for long, and the next run removes its half of a cache."""
    rows = [data_helpers.trace(i, 400) for i in range(20000)]
    source = data_helpers.write_jsonl(tmp_path / "rows.jsonl", rows)
    script = textwrap.dedent("""
        import sys
        from jaxreason import config as cfg
        from jaxreason.data import files, tokenizing
        from jaxreason.data.pipeline import prepare
        from jaxreason.data.tokenizer import load
        if __name__ == "__main__":
            tokenizing._PATIENCE_SECONDS, files.CHUNK_BYTES = -1, 1 << 20
            data = cfg.Data(source=sys.argv[1], max_length=4096, batch_size=2, workers=2, cache_dir=sys.argv[2])
            prepare(data, load("embedded"), 0, progress=False)
    """)
    (tmp_path / "main.py").write_text(script)
    command = [sys.executable, str(tmp_path / "main.py"), source, str(tmp_path / "cache")]
    process = subprocess.Popen(command, env=ENV, start_new_session=True)
    tokens, until = tmp_path / "cache" / "tokens", time.monotonic() + 90
    while len(members(process.pid)) < 4 and time.monotonic() < until:  # itself, a resource tracker, two workers
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while members(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert members(process.pid) == []
    assert len(list(tokens.glob(".*.partial"))) == 1
    data = cfg.Data(source="embedded:arithmetic", max_rows=20, max_length=256, batch_size=2, workers=0,
                    cache_dir=str(tmp_path / "cache"))  # fmt: skip
    prepare(data, load("embedded"), 0, progress=False)
    assert not list(tokens.glob(".*.partial")) and len(list(tokens.iterdir())) == 1


def members(session: int) -> list[int]:
    """Running processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


