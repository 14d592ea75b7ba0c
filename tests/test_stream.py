"""Sources that are addresses, and sources that are read in passes: the same rows, each once a pass, and exact resumption."""

import contextlib
import functools
import gzip
import http.server
import json
import re
import sys
import threading
import tracemalloc

import data_helpers as helpers
import datasets
import fsspec
import jax
import numpy as np
import pytest
from data_helpers import data_config
from helpers import final_params, sft_words

from jaxreason import checkpoint, cli
from jaxreason.data import remote, sources, stream
from jaxreason.data.pipeline import prepare
from jaxreason.data.prompts import load_prompts
from jaxreason.errors import UserError


def rows(first, count):
    return [{"problem": f"What is {i}?", "solution": f"It is {i}.", "answer": f"{i}"} for i in range(first, first + count)]


def lines(first, count):
    return "".join(json.dumps(row) + "\n" for row in rows(first, count)).encode()


@pytest.fixture
def shards(tmp_path):
    """Three files of 20, 30 and 10 rows."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, first, count in (("a", 0, 20), ("b", 20, 30), ("c", 50, 10)):
        (folder / f"{name}.jsonl").write_bytes(lines(first, count))
    return folder


@pytest.fixture
def memory():
    """A folder of fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def numbers(batch, tokenizer):
    """The numbers asked for in a batch, in order."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segment_ids):
        for segment in range(1, segments.max(initial=0) + 1):
            found.append(int(tokenizer.decode(tokens[segments == segment]).split("What is ")[1].split("?")[0]))
    return found


def streamed(tmp_path, source, **options):
    return prepare(data_config(tmp_path, source, streaming=True, **options), helpers.llama(), 3, progress=False)


def taken(prepared, steps, process=(0, 1), state=None):
    with prepared.batches(steps, *process) as batches:
        if state is not None:
            batches.set_state(state)
        return list(batches)


# --- addresses -------------------------------------------------------------------------------------------------------


def test_an_address_has_the_rows_and_the_report_of_the_local_files(shards, memory, tmp_path):
    memory.put(str(shards), "/bucket/rows", recursive=True)
    memory.pipe("/bucket/rows/notes.txt", b"x")
    here = prepare(data_config(tmp_path, shards), helpers.llama(), 0, progress=False)
    for source in ("memory://bucket/rows", "memory://bucket/rows/*.jsonl", f"file://{shards}"):
        there = prepare(data_config(tmp_path, source), helpers.llama(), 0, progress=False)
        assert there.fingerprint == here.fingerprint and there.report.sources[0].rows == 60
    unread = prepare(data_config(tmp_path, "memory://bucket/rows"), helpers.llama(), 0, progress=False).report.sources[0].unread
    assert unread == ("notes.txt (no kind of file that is read)",)
    assert len(load_prompts(data_config(tmp_path, "memory://bucket/rows/b.jsonl"), helpers.llama(), 0)) == 30


def test_every_kind_of_file_is_read_at_an_address(tmp_path, memory):
    table = datasets.Dataset.from_list(rows(0, 7))
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    table.to_csv(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text(json.dumps(rows(0, 7)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(0, 7)))
    for name in ("a.parquet", "saved/data-00000-of-00001.arrow", "a.csv", "a.json", "a.jsonl.gz"):
        memory.put(str(tmp_path / name), f"/kinds/{name.replace('/', '-')}")
        opened = sources.open_source(f"memory://kinds/{name.replace('/', '-')}", None, None, 0)
        assert [row["answer"] for chunk in opened.chunks() for _, row in chunk.rows()] == [str(i) for i in range(7)], name


def test_splits_of_an_address_are_kept_apart(memory, tmp_path):
    memory.pipe({"/hub/data/train-0.jsonl": lines(0, 5), "/hub/data/test-0.jsonl": lines(5, 4)})
    found = sources.open_source("memory://hub", "train", None, 0)
    assert sum(1 for chunk in found.chunks() for _ in chunk.rows()) == 5 and sources.held_out_split("memory://hub") == "test"


def test_an_address_that_changes_is_another_source(memory):
    memory.pipe("/b/a.jsonl", lines(0, 5))
    before = sources.open_source("memory://b/a.jsonl", None, None, 0).fingerprint
    assert sources.open_source("memory://b/a.jsonl", None, None, 0).fingerprint == before
    memory.pipe("/b/a.jsonl", lines(1, 5))
    assert sources.open_source("memory://b/a.jsonl", None, None, 0).fingerprint != before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nosuch://bucket/a.jsonl", "no protocol nosuch://; known ones are s3://"),
        ("memory://bucket/none.jsonl", "there is no such file or directory"),
        ("memory://bucket/*.jsonl", r"it holds no \.jsonl"),
        ("memory://bucket/a.txt", "unknown kind of file"),
        ("memory://bucket/cut.jsonl.gz", r"cut\.jsonl\.gz: damaged, or its connection broke"),
        ("zip://a.jsonl::memory://bucket/a.zip", "several protocols"),
        ("s3://bucket/a.jsonl", "s3:// needs a package that is not installed: pip install s3fs"),
    ],
)
@pytest.mark.parametrize("streaming", ["true", "false"])
def test_what_is_wrong_with_an_address_is_one_message(source, said, streaming, memory, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    memory.pipe({"/bucket/a.txt": b"x", "/bucket/cut.jsonl.gz": gzip.compress(lines(0, 500))[:-20]})
    words = [*sft_words(tmp_path), "data.max_rows=null", f"data.source={source}", f"data.streaming={streaming}"]
    assert cli.train(["--config", "sft", *words, "train.epochs=null"]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error.replace("\n", " ")) and "Traceback" not in error
    assert not list(tmp_path.glob("sft"))


def test_what_may_not_be_read_and_what_is_gone(memory, tmp_path, monkeypatch):
    memory.pipe({"/b/a.jsonl": lines(0, 5), "/b/b.jsonl": lines(5, 5)})
    opened = sources.open_source("memory://b", None, None, 0)
    chunks = opened.chunks()
    next(chunks)
    memory.rm("/b/b.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl: it was there at the start and is gone"):
        next(chunks)

    def refuse(*args, **options):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(type(memory), "info", refuse)
    with pytest.raises(UserError, match="may not be read .Forbidden.; log in"):
        sources.open_source("memory://b", None, None, 0)


def test_a_broken_connection_is_opened_again_where_it_was(memory, monkeypatch):
    memory.pipe("/b/a.jsonl", lines(0, 500))
    reads, real = [], remote._Stream._read
    monkeypatch.setattr(remote, "_WAITS_S", (0.0, 0.0))

    def breaks(self, count):
        reads.append(self._at)
        if len(reads) in (2, 4, 5):
            raise OSError("reset by peer")
        return real(self, min(count, 1000))

    monkeypatch.setattr(remote._Stream, "_read", breaks)
    opened = sources.open_source("memory://b/a.jsonl", None, None, 0)
    found = [row["answer"] for chunk in opened.chunks() for _, row in chunk.rows()]
    assert found == [str(i) for i in range(500)]
    short = remote.RemoteFile("memory://b/a.jsonl", 10**6, "")
    monkeypatch.setattr(remote._Stream, "_read", real)
    with pytest.raises(OSError, match=r"it ends after [\d,]+ of its 1,000,000 bytes"):
        short.open(in_order=True).read()


@contextlib.contextmanager
def web_server(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_web_server_that_knows_no_ranges(shards, tmp_path, capsys):
    pytest.importorskip("aiohttp")
    (shards / "d.jsonl.gz").write_bytes(gzip.compress(lines(60, 5)))
    (shards / "large.jsonl").write_bytes(lines(0, 120_000))  # more than a block of fsspec's
    with web_server(shards) as address:
        for source, count in (("/a.jsonl", 20), ("/d.jsonl.gz?signature=secret", 5), ("/", 120_065), ("/[bc].jsonl", 40)):
            opened = sources.open_source(address + source, None, None, 0)
            assert sum(1 for chunk in opened.chunks() for _ in chunk.rows()) == count, source
        with pytest.raises(UserError, match="none.jsonl: there is no such file") as found:
            sources.open_source(address + "/none.jsonl?signature=secret", None, None, 0)
        assert "secret" not in str(found.value)


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_a_pass_has_every_row_once_and_no_held_out_one(shards, tmp_path, packing):
    """60 rows, 25 of them held out: the first file and five of the second; 35 are left, so four passes are 140."""
    options = {"packing": packing, "stream_rows": 7, "batch_size": 1, "max_length": 128}
    tokenizer, prepared = helpers.llama(), streamed(tmp_path, shards, eval_rows=25, **options)
    held_out = [n for step in range(prepared.eval.num_steps()) for n in numbers(prepared.eval.batch(step), tokenizer)]
    assert sorted(held_out) == list(range(25))
    found = [n for batch in taken(prepared, 141) for n in numbers(batch, tokenizer)]
    passes = [found[i : i + 35] for i in range(0, 140, 35)]
    assert all(sorted(each) == list(range(25, 60)) for each in passes)
    assert passes[0] != passes[1] and passes[0] != sorted(passes[0])
    again = [n for batch in taken(streamed(tmp_path, shards, eval_rows=25, **options), 141) for n in numbers(batch, tokenizer)]
    assert again == found


def test_without_shuffle_it_is_the_order_of_the_files(shards, tmp_path):
    prepared = streamed(tmp_path, shards, shuffle=False, packing=False, batch_size=4, stream_rows=9, max_length=128)
    assert [n for batch in taken(prepared, 30) for n in numbers(batch, helpers.llama())] == [*range(60), *range(60)]


def test_each_block_has_an_order_of_its_own(shards, tmp_path):
    """One file of 30 rows in blocks of 30: every block is one pass in the file's order, shuffled."""
    prepared = streamed(tmp_path, shards / "b.jsonl", packing=False, batch_size=30, stream_rows=30, max_length=128)
    first, second = (numbers(batch, helpers.llama()) for batch in taken(prepared, 2))
    assert sorted(first) == sorted(second) == list(range(20, 50)) and first != second


@pytest.mark.parametrize("kind", ["local", "address", "hub"])
def test_a_stream_goes_on_bitwise_from_any_step(shards, tmp_path, memory, kind, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_ROWS", 8)
    if kind == "address":
        memory.put(str(shards), "/bucket/rows", recursive=True)
    elif kind == "hub":
        monkeypatch.setattr(stream, "CHUNK_ROWS", 8)
        monkeypatch.setattr("jaxreason.data.pipeline.open_source", lambda *a, **k: sources.hub_stream(str(shards), None, "train"))
    source = "memory://bucket/rows" if kind == "address" else shards

    def make():
        return streamed(tmp_path, source, batch_size=2, stream_rows=11, max_length=128, eval_rows=3)

    states, whole = [], []
    with make().batches(40, 0, 1) as batches:
        for batch in batches:
            whole.append(batch)
            states.append(json.loads(json.dumps(batches.get_state())))
    for step in (0, 1, 5, 16, 38):
        for left, right in zip(taken(make(), 40, state=states[step]), whole[step + 1 :], strict=True):
            for field in ("tokens", "targets", "positions", "segment_ids", "loss_mask", "sequence_ids"):
                assert np.array_equal(getattr(left, field), getattr(right, field)), (step, field)


def test_two_processes_read_disjoint_rows_that_are_the_batch_of_one(shards, tmp_path):
    def make():
        return streamed(tmp_path, shards, batch_size=4, stream_rows=11, max_length=128, packing=False)

    tokenizer = helpers.llama()
    for one, first, second in zip(*(taken(make(), 15, process) for process in ((0, 1), (0, 2), (1, 2))), strict=True):
        assert np.array_equal(one.tokens, np.concatenate([first.tokens, second.tokens]))
        assert np.array_equal(one.sequence_ids, np.concatenate([first.sequence_ids, second.sequence_ids]))
        assert not set(numbers(first, tokenizer)) & set(numbers(second, tokenizer))


def test_at_most_two_blocks_are_held(tmp_path, monkeypatch):
    """Rows that were read and are not in a batch yet: two blocks, and what is left of a chunk."""
    source = tmp_path / "large.jsonl"
    source.write_bytes(lines(0, 4_000))
    monkeypatch.setattr("jaxreason.data.files.CHUNK_BYTES", 4000)
    read, given, most, real = [0], 0, 0, stream.Stream._examples

    def counted(self, *args):
        found = real(self, *args)
        read[0] += len(found)
        return found

    prepared = streamed(tmp_path, source, batch_size=4, stream_rows=100, max_length=128, packing=False)
    monkeypatch.setattr(stream.Stream, "_examples", counted)
    tracemalloc.start()
    peaks = []
    with prepared.batches(600, 0, 1) as batches:
        for step, _ in enumerate(batches):
            given += 4
            most = max(most, read[0] - given)
            if step in (99, 599):
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.reset_peak()
    tracemalloc.stop()
    assert 100 <= most <= 200 + 60, most
    assert peaks[1] < 2 * peaks[0], peaks  # what was trained is not kept: 2,000 more rows would be six times as much


def test_a_stream_that_fails_is_saved_first_and_goes_on_bitwise(shards, tmp_path, monkeypatch, capsys):
    words = [*sft_words(tmp_path), "data.max_rows=null", f"data.source={shards}", "data.streaming=true", "data.stream_rows=13",
             "train.epochs=null", "train.steps=4", "data.batch_size=8", "train.save_every=0"]  # fmt: skip
    assert cli.train(["--config", "sft", *words, "run.name=whole"]) == 0
    report = json.loads((tmp_path / "whole" / "data_report.json").read_text())
    assert report["sources"][0]["streamed"] and report["stream"]["rows"] >= 20 and report["train"]["steps_per_epoch"] is None
    following, calls = stream.StreamBatches.__next__, []

    def failing(self):
        calls.append(1)
        if len(calls) == 4:
            raise UserError("b.jsonl: it was there at the start and is gone")
        return following(self)

    with monkeypatch.context() as patched:
        patched.setattr(stream.StreamBatches, "__next__", failing)
        assert cli.train(["--config", "sft", *words, "run.name=cut"]) == 2
    assert "b.jsonl: it was there at the start and is gone" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path / "cut" / "checkpoints") == [3]
    assert cli.train(["--config", "sft", *words, "run.name=cut"]) == 0
    whole, cut = (jax.tree.leaves(final_params(tmp_path / name)) for name in ("whole", "cut"))
    assert all(np.array_equal(a, b) for a, b in zip(whole, cut, strict=True))
    assert json.loads((tmp_path / "cut" / "data_report.json").read_text())["stream"] == report["stream"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.steps=null", "train.epochs=1"], "set train.epochs=null and train.steps"),
        (["data.mixture=[{source: b.jsonl}]"], "data.streaming does not go with data.mixture"),
        (["data.max_rows=5"], "data.streaming does not go with data.max_rows"),
        (["data.eval_rows=60"], "data.eval_rows=60 leaves nothing to train"),
        (["data.schema=text"], "no trained token in"),
    ],
)
def test_what_a_stream_does_not_go_with(shards, tmp_path, capsys, words, said):
    base = [*sft_words(tmp_path), "data.max_rows=null", f"data.source={shards}", "data.streaming=true"]
    assert cli.train(["--config", "sft", *base, *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_file_that_vanishes_while_it_is_streamed(shards, tmp_path):
    prepared = streamed(tmp_path, shards, shuffle=False, batch_size=4, stream_rows=9, max_length=128)
    (shards / "b.jsonl").unlink()
    with pytest.raises((UserError, OSError), match="b.jsonl"):
        taken(prepared, 30)


def test_a_hub_layout_is_streamed_by_its_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for name, first in (("train-00000-of-00002", 0), ("train-00001-of-00002", 10), ("test-00000-of-00001", 20)):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines(first, 10))
    found = sources.hub_stream(str(tmp_path), None, "train")
    assert [next(row["answer"] for chunk in shard.chunks() for _, row in chunk.rows()) for shard in found.shards] == ["0", "10"]
    again = sources.hub_stream(str(tmp_path), None, "train")
    assert again.fingerprint == found.fingerprint
    (tmp_path / "data" / "train-00001-of-00002.jsonl").write_bytes(lines(30, 10))
    assert sources.hub_stream(str(tmp_path), None, "train").fingerprint != found.fingerprint
    with pytest.raises(UserError, match="Bad split: none"):
        sources.hub_stream(str(tmp_path), None, "none")


def test_grpo_prompts_of_a_stream(shards, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("jaxreason.data.prompts.open_source", lambda *a: asked.append(a) or sources.open_source(*a))
    found = load_prompts(data_config(tmp_path, shards, streaming=True), helpers.llama(), 0)
    assert len(found) == 60 and asked[0][-1] is True
