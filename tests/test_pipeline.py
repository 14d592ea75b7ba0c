import functools
import json
import os
import sys
import types

import data_helpers as helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxreason.data import chunks, files, json_rows, sources, tables
from jaxreason.data.batches import loader
from jaxreason.data.example import Example
from jaxreason.data.pipeline import held_out_source, prepare
from jaxreason.data.prompts import PromptStream, load_prompts
from jaxreason.errors import UserError

TRACES = [helpers.trace(i, words=1 + i % 7) for i in range(24)]


@pytest.fixture
def config(tmp_path):
    return functools.partial(helpers.data_config, tmp_path, batch_size=2)


def run(config, seed=0, tokenizer=None):
    return prepare(config, tokenizer or helpers.llama(), seed, progress=False)


def texts(rows):
    """Every example's text in stored order."""
    tokenizer = helpers.llama()
    return [tokenizer.decode(rows._store.example(int(i))) for i in rows.index]


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "lines.json", "array.json", "parquet", "directory"])
def test_every_kind_of_source_gives_the_same_examples(kind, tmp_path, config, monkeypatch):
    for module in (files, chunks, json_rows):
        monkeypatch.setattr(module, "CHUNK_BYTES", 700)  # so that lines lie across chunk borders
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 5)
    path = tmp_path / f"rows.{kind}"
    if kind in ("jsonl", "lines.json"):
        helpers.write_jsonl(path, TRACES)
    elif kind == "array.json":
        path.write_text("\n " + json.dumps(TRACES, indent=1))
    elif kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(TRACES), path, row_group_size=10)
    else:
        (path / "below").mkdir(parents=True)
        (path / ".hidden").mkdir()
        helpers.write_jsonl(path / ".hidden" / "x.jsonl", [{"odd": 1}])
        pa.parquet.write_table(pa.Table.from_pylist(TRACES[:9]), path / "a.parquet")
        # Another format in the same directory: formats are found for each row.
        rows = [{"prompt": r["messages"][0]["content"], "completion": r["messages"][1]["content"]} for r in TRACES[9:]]
        helpers.write_jsonl(path / "below" / "b.jsonl", rows)
    prepared = run(config(path))
    expected = run(config(helpers.write_jsonl(tmp_path / "expected.jsonl", TRACES)))
    assert texts(prepared.train) == texts(expected.train) and len(texts(expected.train)) == 24
    assert prepared.train._store.rows.tolist() == list(range(24))
    assert prepared.report.sources[0].rows == 24


def test_large_row_groups_are_read_in_pieces(tmp_path, config, monkeypatch):
    monkeypatch.setattr(tables, "GROUP_ROWS", 6)
    monkeypatch.setattr(tables, "CHUNK_ROWS", 5)
    pa.parquet.write_table(pa.Table.from_pylist(TRACES), tmp_path / "a.parquet")
    pieces = list(sources.open_source(str(tmp_path / "a.parquet"), "train", None, 0).chunks())
    assert [chunk.weight for chunk in pieces] == [5, 5, 5, 5, 4]
    assert pieces[1].place(2).endswith("a.parquet, row 8")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n\n{"text": \n{"text": "b"}\n', r"rows\.jsonl, line 3: not valid JSON.*repair or remove"),
        ('{"text": "a"}\n{"text": "b', r"rows\.jsonl, line 2: not valid JSON.*may be cut short"),
        ("", r"rows\.jsonl: the file is empty"),
        ("\n\n", r"rows\.jsonl: holds no rows"),
        (b'{"text": "\xff"}\n', r"rows\.jsonl, line 1: not valid JSON"),
    ],
)
def test_damaged_files_name_file_and_line_and_leave_nothing(content, message, tmp_path, config):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        run(config(path))
    assert not list((tmp_path / "cache").rglob("*.bin"))


def test_damaged_array_and_parquet(tmp_path, config):
    cut = tmp_path / "a.json"
    cut.write_text('[{"text": "a"},\n{"text": ')
    with pytest.raises(UserError, match=r"a\.json, about line 2: not valid JSON"):
        run(config(cut))
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
        run(config(broken))


def test_sources_that_are_not_there(tmp_path, config, monkeypatch):
    monkeypatch.setattr("jaxreason.data.hub.offline", lambda: True)
    with pytest.raises(UserError, match=r"data\.source open-r1/Mixture-of-Thoughts.*cannot be reached.*hf auth login"):
        run(config("open-r1/Mixture-of-Thoughts:all"))
    with pytest.raises(UserError, match="no such file or directory"):
        run(config("data/none.jsonl"))
    with pytest.raises(UserError, match=r"it holds no \.jsonl"):
        run(config(tmp_path))
    (tmp_path / "rows.xml").write_text("a")
    with pytest.raises(UserError, match="unknown kind of file"):
        run(config(tmp_path / "rows.xml"))
    with pytest.raises(UserError, match=r"data\.schema nope: no such row format; known: auto, openr1"):
        run(config(helpers.write_jsonl(tmp_path / "a.jsonl", TRACES), schema="nope"))


def test_hub_rows_come_through_datasets(config, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **options):
        asked.append((*args, options["split"]))
        return datasets.Dataset.from_list(TRACES)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared = run(config("owner/name:part", split="train[:24]"))
    assert asked == [("owner/name", "part", "train[:24]")] and prepared.report.sources[0].kept == 24


def test_embedded_task(config, monkeypatch):
    task = types.ModuleType("jaxreason.data.embedded")
    task.examples = lambda name, split, n, seed: [Example(f"{name} {split} {i}", "a") for i in range(seed, seed + n)]
    monkeypatch.setitem(sys.modules, "jaxreason.data.embedded", task)
    monkeypatch.setattr("jaxreason.data.embedded", task, raising=False)
    prepared = run(config("embedded:sums", max_rows=3, eval_source="embedded:sums", eval_rows=2), seed=5)
    assert "sums train 5" in texts(prepared.train)[0] and "sums eval 5" in texts(prepared.eval)[0]
    assert len(texts(prepared.train)) == 3 and len(texts(prepared.eval)) == 2


# --- cache -----------------------------------------------------------------------------------------------------------


def test_cache_hits_until_something_changes(tmp_path, config, monkeypatch):
    path = tmp_path / "rows.jsonl"
    helpers.write_jsonl(path, TRACES)
    made = lambda: {p.parent.name for p in (tmp_path / "cache").rglob("tokens.bin")}  # noqa: E731
    first = texts(run(config(path)).train)
    assert len(made()) == 1
    monkeypatch.setattr("jaxreason.data.encode.Encoder.chunk", None)  # a hit encodes nothing
    assert texts(run(config(path)).train) == first
    # Length, packing, order and held-out rows are chosen after tokenization.
    assert run(config(path, max_length=128, packing=False, eval_rows=3), seed=4).eval is not None
    monkeypatch.undo()
    run(config(path, system_prompt="think"))
    run(config(path, template="r1_zero", max_length=1024))
    run(config(path), tokenizer=helpers.llama(generation_config={"eos_token_id": 9}))
    assert len(made()) == 4
    helpers.write_jsonl(path, [helpers.trace(99), *TRACES[1:]])
    os.utime(path, ns=(1, 1))  # a coarse clock must not hide the change
    assert "99 + 1" in texts(run(config(path)).train)[0] and len(made()) == 5


def test_processes_give_the_same_data(tmp_path, config, monkeypatch):
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", [*TRACES, {"messages": []}, *TRACES])
    alone = run(config(path, max_rows=40))
    monkeypatch.setattr(files, "CHUNK_BYTES", 900)
    monkeypatch.setattr("jaxreason.data.tokenizing._PATIENCE_SECONDS", 0)
    together = run(config(path, max_rows=40, workers=2, cache_dir=str(tmp_path / "other")))
    assert texts(together.train) == texts(alone.train) and len(texts(alone.train)) == 39
    assert together.report.sources == alone.report.sources
    assert alone.report.sources[0].first_dropped == {
        "messages is empty or not a list": f"{path}, line 25"
    }  # fmt: skip


# --- what is trained -------------------------------------------------------------------------------------------------


def test_report_counts_every_row(tmp_path, config):
    rows = [helpers.trace(1), helpers.trace(2, words=60), {"messages": []}, {"messages": None}, helpers.trace(3)]
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared = run(config(path, max_length=100, batch_size=1))
    report = prepared.report.sources[0]
    assert report.rows == 5 and report.kept == 2 and report.truncated == 0
    assert report.dropped == {"messages is empty or not a list": 2, "longer than max_length": 1}
    lengths = sorted(len(prepared.train._store.example(i)) for i in range(3))
    assert (report.length_percentiles["p5"], report.length_percentiles["p100"]) == (lengths[0], lengths[2])
    assert report.tokens == sum(lengths[:2]) and report.formats == {"messages": 5}
    trained = sum(prepared.train.batch(step).loss_mask.sum() for step in range(prepared.train.num_steps()))
    assert report.trained_tokens == trained
    rows_report = prepared.report.train
    assert rows_report.packing_efficiency == report.tokens / (rows_report.rows_per_epoch * 100)
    written = json.loads(json.dumps(prepared.report.to_dict()))
    assert written["sources"][0]["dropped"]["longer than max_length"] == 1 and written["eval"] is None


def test_truncated_rows_are_counted_and_get_no_stop_token(tmp_path, config):
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", [helpers.trace(1), helpers.trace(2, words=60)])
    tokenizer = helpers.llama()
    prepared = run(config(path, max_length=100, over_length="truncate", packing=False, shuffle=False))
    assert prepared.report.sources[0].truncated == 1 and prepared.report.sources[0].kept == 2
    batch = prepared.train.batch(0)
    trained = [set(batch.targets[row][batch.loss_mask[row] > 0].tolist()) for row in range(2)]
    stop = tokenizer.hf.convert_tokens_to_ids("<|eot_id|>")
    assert stop in trained[0] and not trained[1] & set(tokenizer.stop_ids)


def test_nothing_to_train_is_an_error(tmp_path, config):
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES)
    with pytest.raises(UserError, match=r"no trained token in 24 rows, dropped by reason \(longer than max_length: 24\)"):
        run(config(path, max_length=8))
    questions = helpers.write_jsonl(tmp_path / "q.jsonl", [{"nums": [1, 2], "target": 3}])
    with pytest.raises(UserError, match=r"no answer to train on: 1; first: .*q\.jsonl, line 1"):
        run(config(questions))


def test_unpacked_rows_are_as_long_as_the_longest_example_needs(tmp_path, config):
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES)
    prepared = run(config(path, packing=False, eval_rows=4))
    longest = max(len(prepared.train._store.example(i)) for i in range(24))
    assert prepared.train.length == prepared.eval.length == -(-longest // 64) * 64 < 256
    assert run(config(path, packing=False, max_length=longest + 1)).train.length == longest + 1
    assert run(config(path)).train.length == 256


def test_held_out_rows_are_chosen_by_seed_and_never_trained(tmp_path, config):
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES)

    def held_out(seed):
        prepared = run(config(path, eval_rows=6), seed=seed)
        train, chosen = texts(prepared.train), texts(prepared.eval)
        assert len(chosen) == 6 and sorted(train + chosen) == sorted(texts(run(config(path)).train))
        return chosen

    assert held_out(0) == held_out(0) != held_out(1)
    with pytest.raises(UserError, match="eval_rows=24 leaves nothing to train"):
        run(config(path, eval_rows=24))


def test_eval_source(tmp_path, config):
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES)
    other = helpers.write_jsonl(tmp_path / "other.jsonl", [helpers.trace(i) for i in range(70, 79)])
    prepared = run(config(path, eval_source=other, eval_rows=5))
    assert len(texts(prepared.train)) == 24 and len(texts(prepared.eval)) == 5
    assert [source.source for source in prepared.report.sources] == [path, other]


def test_preview_marks_trained_tokens_without_colour(tmp_path, config):
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES)
    shown = run(config(path)).preview(2)
    assert len(shown) == 2
    assert "\n\n[[<think>\nadd 0\n</think>\n\n1<|eot_id|>]]" in shown[0].plain


def test_table_prints_reasons(tmp_path, config):
    from rich.console import Console

    path = helpers.write_jsonl(tmp_path / "rows.jsonl", [*TRACES, {"messages": []}])
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    console.print(run(config(path, eval_rows=2)).report.table())
    printed = console.export_text()
    assert "dropped: messages is empty or not a list" in printed and f"{path}, line 25" in printed
    assert "p50" in printed and "eval" in printed


# --- loader ----------------------------------------------------------------------------------------------------------


def test_a_restarted_loader_goes_on_where_it_was(tmp_path, config):
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES)
    rows = run(config(path, packing=True)).train
    straight = [batch.tokens for batch in loader(rows, 12)]
    assert len(straight) == 12
    interrupted = loader(rows, 12)
    for _ in range(5):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = loader(run(config(path)).train, 12)
    resumed.set_state(state)
    np.testing.assert_array_equal([batch.tokens for batch in resumed], straight[5:])
    np.testing.assert_array_equal([batch.tokens for batch in loader(rows, 12, start_step=9)], straight[9:])
    half = next(loader(rows, 12, start_step=3, process_index=1, process_count=2, threads=0))
    np.testing.assert_array_equal(half.tokens, straight[3][1:])


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_the_untrained_part_of_training_rows(tmp_path, config):
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES)
    prepared, prompts = run(config(path)), load_prompts(config(path), helpers.llama(), 0)
    assert len(prompts) == 24 and prompts.rows == 24 and prompts.dropped == {}
    store = prepared.train._store
    for i, prompt in enumerate(prompts.prompts):
        assert list(prompt.ids) == store.example(i)[: store.starts[i]].tolist()
        assert (prompt.gold, prompt.user, prompt.index) == (str(i + 1), f"{i} + 1 =", i)


def test_prompts_without_gold_or_too_long_are_counted(tmp_path, config):
    rows = [{"question": "q", "answer": "x #### 5"}, {"question": "q " * 99, "answer": "6"}, {"question": "q"}]
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", rows)
    prompts = load_prompts(config(path), helpers.llama(), 0, max_prompt_tokens=90)
    assert [prompt.gold for prompt in prompts.prompts] == ["5"]
    assert prompts.dropped == {"prompt longer than 90 tokens": 1, "columns match no known row format": 1}
    assert load_prompts(config(path, max_rows=1), helpers.llama(), 0).rows == 1
    golden = helpers.write_jsonl(tmp_path / "none.jsonl", [{"messages": TRACES[0]["messages"]}])
    with pytest.raises(UserError, match=r"no usable prompt in 1 rows \(no gold answer: 1; first: .*none\.jsonl, line 1\)"):
        load_prompts(config(golden), helpers.llama(), 0)


def test_openr1_rows_without_a_usable_trace_are_still_prompts(tmp_path, config):
    row = {"problem": "q", "answer": "4", "generations": ["<think>cut"], "is_reasoning_complete": [False]}
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", [row])
    assert load_prompts(config(path), helpers.llama(), 0)[0].gold == "4"


# --- what a run's data is --------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_examples_not_of_their_files(tmp_path, config, monkeypatch):
    """The same rows under another spelling, time, folder or format are the same data; one other letter is not."""
    path = tmp_path / "rows.jsonl"
    helpers.write_jsonl(path, TRACES)
    sft = lambda at, **options: run(config(at, **options)).fingerprint  # noqa: E731
    grpo = lambda at, **options: load_prompts(config(at), helpers.llama(), 0, **options).fingerprint  # noqa: E731
    first = sft(path), grpo(path)
    os.utime(path, ns=(1, 1))
    pa.parquet.write_table(pa.Table.from_pylist(TRACES), tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    helpers.write_jsonl(tmp_path / "folder" / "a.jsonl", TRACES[:9])
    helpers.write_jsonl(tmp_path / "folder" / "b.jsonl", TRACES[9:])
    monkeypatch.chdir(tmp_path)
    for same in (path, "rows.jsonl", tmp_path / "folder" / ".." / "rows.jsonl", "rows.parquet", "folder"):
        assert (sft(same), grpo(same)) == first, same
    helpers.write_jsonl(tmp_path / "folder" / "b.jsonl", TRACES[9:-1])
    for changed in ("folder", helpers.write_jsonl(tmp_path / "order.jsonl", TRACES[::-1])):
        assert sft(changed) != first[0] and grpo(changed) != first[1]
    longest = max(len(run(config(path)).train._store.example(i)) for i in range(24))
    assert sft(path, max_length=longest) == first[0] != sft(path, max_length=longest - 1)  # which leaves examples out
    assert sft(path, eval_rows=3) != first[0] != sft(path, template="r1_zero", max_length=1024)
    assert grpo(path, max_prompt_tokens=10**6) == first[1]


def test_a_change_of_content_is_seen_under_the_same_size_and_time(tmp_path, config):
    """The tokens come from a cache whose key is cheap; a file rewritten at its old size and time is tokenized again."""
    path = tmp_path / "rows.jsonl"
    helpers.write_jsonl(path, TRACES)
    before, prompts, stat = run(config(path)), load_prompts(config(path), helpers.llama(), 0), path.stat()
    path.write_text(path.read_text().replace("add 3", "add 4"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = run(config(path))
    assert texts(after.train) != texts(before.train) and after.fingerprint != before.fingerprint
    assert load_prompts(config(path), helpers.llama(), 0).fingerprint == prompts.fingerprint  # no prompt has changed
    path.write_text(path.read_text().replace('"gold": 4', '"gold": 5'))
    assert load_prompts(config(path), helpers.llama(), 0).fingerprint != prompts.fingerprint


def test_the_fingerprint_of_a_program_is_of_its_parameters_and_seed(config):
    found = {
        (name, seed): load_prompts(config(f"embedded:{name}", max_rows=20), helpers.llama(), seed).fingerprint
        for name in ("arithmetic", "arithmetic?operations=3")
        for seed in (0, 1)
    }
    assert len(set(found.values())) == 4
    again = load_prompts(config("embedded:arithmetic", max_rows=20), helpers.llama(), 0)
    assert again.fingerprint == found["arithmetic", 0]


def test_columns_that_a_reward_reads_are_part_of_the_prompts(tmp_path, config):
    rows = [{"question": f"{i}?", "answer": "1", "level": i} for i in range(3)]
    path = helpers.write_jsonl(tmp_path / "a.jsonl", rows)
    other = helpers.write_jsonl(tmp_path / "b.jsonl", [*rows[:2], rows[2] | {"level": 9}])
    find = lambda at, **options: load_prompts(config(at, **options), helpers.llama(), 0).fingerprint  # noqa: E731
    assert find(path) == find(other)
    assert find(path, keep_columns=["level"]) != find(other, keep_columns=["level"])


# --- held-out splits -------------------------------------------------------------------------------------------------


def split_directory(root, **splits):
    (root / "data").mkdir(parents=True)
    for name, numbers in splits.items():
        helpers.write_jsonl(root / "data" / f"{name}-00000-of-00001.jsonl", [helpers.trace(i) for i in numbers])
    return str(root)


def golds(prompts):
    return [int(prompt.gold) - 1 for prompt in prompts.prompts]


def test_files_named_after_splits_are_splits(tmp_path, config):
    root = split_directory(tmp_path / "a", train=range(3), test=range(10, 12), validation=range(20, 21), part=range(3, 5))
    find = lambda **options: golds(load_prompts(config(root, **options), helpers.llama(), 0))  # noqa: E731
    assert find() == [3, 4, 0, 1, 2]  # a file named after no split is of train
    assert find(split="test") == [10, 11] and find(split="dev") == find(split="validation") == [20]
    with pytest.raises(UserError, match=r"no file of split eval; by their names its files are of test, train, validation"):
        find(split="eval")
    prepared = run(config(root, eval_split="test"))
    assert len(texts(prepared.train)) == 5 and texts(prepared.eval) == texts(run(config(root, split="test")).train)
    latest = split_directory(tmp_path / "b", latest=range(2), protest=range(2, 4))  # a split's name is a word of its own
    assert len(load_prompts(config(latest), helpers.llama(), 0)) == 4


def test_held_out_rows_without_a_split_come_from_test_then_validation(tmp_path, config):
    both = split_directory(tmp_path / "a", train=range(3), validation=range(20, 22), test=range(10, 11))
    one = split_directory(tmp_path / "b", train=range(3), valid=range(20, 22))
    none = split_directory(tmp_path / "c", train=range(3), test=range(9, 10))
    (tmp_path / "c" / "data" / "test-00000-of-00001.jsonl").rename(tmp_path / "c" / "data" / "hard.jsonl")
    other = helpers.write_jsonl(tmp_path / "o.jsonl", TRACES)
    assert held_out_source(config(other, eval_source=both)) == (both, "test")
    assert held_out_source(config(other, eval_source=one)) == (one, "validation")
    assert held_out_source(config(other, eval_source=none)) == (none, None)  # no file is named after a split but train
    assert held_out_source(config("embedded:arithmetic")) == ("embedded:arithmetic", "eval")


def test_a_held_out_source_that_is_not_there_is_named(tmp_path, config):
    other = helpers.write_jsonl(tmp_path / "o.jsonl", TRACES)
    with pytest.raises(UserError, match=r"none/here\.jsonl: no such file or directory"):
        run(config(other, eval_source="none/here.jsonl"))


def test_held_out_splits_of_a_hub_data_set_are_asked_for(config, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, part: {None: ["train", "test"]}.get(part, ["train"]))
    assert held_out_source(config("a/b", eval_source="c/d")) == ("c/d", "test")
    assert held_out_source(config("a/b", eval_source="c/d:x", eval_split="train")) == ("c/d:x", "train")
    with pytest.raises(UserError, match=r"c/d:x: its splits are train, and none of them .*data\.eval_split"):
        held_out_source(config("a/b", eval_source="c/d:x"))

    def fails(name, part):
        raise ConnectionError("no way out")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fails)
    with pytest.raises(UserError, match=r"c/d: its splits cannot be listed: .*set data\.eval_split"):
        held_out_source(config("a/b", eval_source="c/d"))


@pytest.mark.parametrize(
    "options",
    [
        {"eval_split": "train"},
        {"eval_source": "embedded:arithmetic?operations=3", "eval_split": "train"},
        {"source": "rows.jsonl", "eval_source": "./rows.jsonl"},
        {"source": "rows.jsonl", "eval_source": "."},
        {"source": "a/b", "split": "test", "eval_source": "a/b", "eval_split": "test"},
    ],
)
def test_rows_that_are_trained_are_no_held_out_rows(options, tmp_path, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES)
    with pytest.raises(UserError, match=r"data\.eval_source .* is what is trained"):
        held_out_source(config(**{"source": "embedded:arithmetic", **options}))


# --- the stream of prompts -------------------------------------------------------------------------------------------


def test_prompts_come_in_a_new_order_each_epoch_drawn_once(tmp_path, config, monkeypatch):
    prompts = load_prompts(config(helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES)), helpers.llama(), 0)
    orders = [np.random.default_rng([7, epoch]).permutation(24).tolist() for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(24))
    drawn = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or real(seed))
    stream = PromptStream(prompts, 7, shuffle=True)
    assert [stream.at(cursor).index for cursor in range(72)] == [i for order in orders for i in order]
    assert drawn == [[7, 0], [7, 1], [7, 2]]
    assert stream.at(30).index == orders[1][6]  # where a resumed run goes on
    plain = PromptStream(prompts, 7, shuffle=False)
    assert [plain.at(cursor).index for cursor in (0, 23, 24, 71)] == [0, 23, 0, 23]


# --- weights of thought and answer -----------------------------------------------------------------------------------


def test_weights_of_thought_and_answer_meet_after_the_tag(tmp_path, config):
    """Targets up to the token that ends ``</think>`` weigh 0.25, everything after it 4; two rows, so that none is first."""
    tokenizer = helpers.llama()
    path = helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES[:4])
    prepared = run(config(path, think_weight=0.25, answer_weight=4.0, shuffle=False, batch_size=1))
    batch, seen = prepared.train.batch(0), 0
    for segment in range(1, 5):
        at = (batch.segment_ids[0] == segment) & (batch.loss_mask[0] > 0)
        targets, weights = batch.targets[0][at], batch.token_weights[0][at]
        thought = next(n for n in range(1, len(targets)) if "</think>" in tokenizer.decode(targets[:n]))
        np.testing.assert_array_equal(weights[:thought], 0.25)
        np.testing.assert_array_equal(weights[thought:], 4.0)
        assert tokenizer.decode(targets[thought:]).strip().startswith(str(segment))  # the gold of row i is i + 1
        seen += 0 < thought < len(targets)
    assert seen == 4


def test_the_order_of_rows_differs_between_epochs(tmp_path, config):
    rows = run(config(helpers.write_jsonl(tmp_path / "rows.jsonl", TRACES), packing=False, batch_size=24)).train
    one, two = ([rows.examples(row)[0] for row in range(24 * epoch, 24 * epoch + 24)] for epoch in (0, 1))
    assert one != two and sorted(one) == sorted(two) == list(range(24))
