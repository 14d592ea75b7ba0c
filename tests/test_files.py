"""Kinds of files, and which files a source means."""

import csv
import functools
import gzip
import io
import json
import os

import data_helpers as helpers
import pyarrow as pa
import pytest
from rich.console import Console

from jaxreason import cli
from jaxreason.data import chunks, files
from jaxreason.data.pipeline import prepare, too_few_rows
from jaxreason.data.prompts import load_prompts
from jaxreason.errors import UserError

ROWS = [{"question": f"what is {i}?", "answer": f"{i},{i} \u00fc\u2028\n"} for i in range(20)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
BOM = b"\xef\xbb\xbf"


def table(delimiter):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def zst(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


def arrow(opening):
    sink, made = pa.BufferOutputStream(), pa.Table.from_pylist(ROWS)
    with opening(sink, made.schema) as writer:
        for batch in made.to_batches(max_chunksize=7):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


KINDS = {
    "a.ndjson": LINES, "a.JSONL": LINES, "a.Json": ARRAY, "bom.jsonl": BOM + LINES, "bom.json": BOM + b"\n " + ARRAY,
    "a.jsonl.gz": gzip.compress(LINES), "a.json.gz": gzip.compress(ARRAY), "lines.json.gz": gzip.compress(LINES),
    "a.jsonl.zst": zst(LINES), "bom.json.zst": zst(BOM + ARRAY), "A.CSV.GZ": gzip.compress(table(",")),
    "a.csv": table(","), "a.tsv": table("\t"), "bom.csv": BOM + table(","), "blank.csv": table(",").replace(b"\n", b"\n\r\n", 1),
    "stream.arrow": arrow(pa.ipc.new_stream), "file.arrow": arrow(pa.ipc.new_file),
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    return functools.partial(helpers.data_config, tmp_path)


def load(config):
    return load_prompts(config, helpers.llama(), 0)


def golds(prompts):
    return [prompt.gold for prompt in prompts.prompts]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_the_same_rows(name, tmp_path, config, monkeypatch):
    for module in (chunks, files):
        monkeypatch.setattr(module, "CHUNK_BYTES", 300)
    path = tmp_path / name
    path.write_bytes(KINDS[name])
    prompts = load(config(path))
    assert prompts.rows == 20 and prompts.dropped == {}
    assert [(p.user, p.gold) for p in prompts.prompts] == [(f"what is {i}?", f"{i},{i} \u00fc") for i in range(20)]
    assert prepare(config(path), helpers.llama(), 0, progress=False).report.sources[0].kept == 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], r"a\.jsonl\.gz: damaged: .*download or write it again"),
        ("a.jsonl.gz", LINES, r"a\.jsonl\.gz: damaged: Not a gzipped file"),
        ("a.json.gz", b"xx", r"a\.json\.gz: damaged"),
        ("a.jsonl.zst", LINES, r"a\.jsonl\.zst: damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "q", "answer": "1"}\n{"a', mtime=0), r"a\.jsonl\.gz, line 2: not valid JSON"),
        ("a.csv", b"\xff\xfe\x00a", r"a\.csv: not UTF-8 text"),
        ("a.json", b'[{"a": "\xff"}]', r"a\.json: not UTF-8 text"),
        ("a.csv", b"question,question\n1,2\n", r"a\.csv, line 1: names the columns, each once; found question, question"),
        ("a.arrow", b"ARROW1 no", r"a\.arrow, near row 1: not a readable Arrow file"),
        ("a.parquet.gz", b"x", r"unknown kind of file; known: \.jsonl, \.ndjson.*also packed as \.gz or \.zst"),
        ("a.txt", b"x", "unknown kind of file"),
    ],
)
def test_a_damaged_file_is_named(name, content, message, tmp_path, config):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(config(tmp_path / name))


def test_a_line_of_other_fields_is_counted(tmp_path, config):
    (tmp_path / "a.csv").write_text('question,answer\nq,"1\n"\nq,1,2\nq\nq,\nr,2\n')
    prompts = load(config(tmp_path / "a.csv"))
    assert golds(prompts) == ["1", "2"] and prompts.dropped == {"another number of fields than of columns": 2, "no answer": 1}
    first = prompts.report()["sources"][0]["first_dropped"]["another number of fields than of columns"]
    assert first == f"{tmp_path / 'a.csv'}, row 2: 3 for 2"


def test_an_empty_field_is_none(tmp_path, config):
    (tmp_path / "a.csv").write_text("question,answer,prompt,completion,text\nq,1,,,\n,,p,2,\n,,,,words\n")
    report = prepare(config(tmp_path / "a.csv"), helpers.llama(), 0, progress=False).report.sources[0]
    assert report.formats == {"question_answer": 1, "prompt_completion": 1, "text": 1} and report.kept == 3


# ---- which files


def write(path, *numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    helpers.write_jsonl(path, [{"question": "q", "answer": f"{n}"} for n in numbers])
    return path


def test_what_save_to_disk_wrote(tmp_path, config):
    import datasets

    both = {"train": ROWS[:5], "test": ROWS[5:8]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in both.items()}).save_to_disk(tmp_path / "both")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load(config(tmp_path / "both")).rows == 5 and load(config(tmp_path / "both", split="test")).rows == 3
    one = load(config(tmp_path / "one"))
    assert one.rows == 20 and one.dropped == {}  # dataset_info.json and state.json are no rows
    unread = ("dataset_info.json (no kind of file that is read)", "state.json (no kind of file that is read)")
    assert one.sources[0].unread == unread


def test_patterns(tmp_path, config):
    for name, n in {"a/train-0.jsonl": 1, "a/train-1.jsonl.gz": 2, "a/test-0.jsonl": 3, "b/x.jsonl": 4}.items():
        write(tmp_path / name, n)
    packed = tmp_path / "a" / "train-1.jsonl.gz"
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    find = lambda pattern, **options: golds(load(config(tmp_path / pattern, **options)))  # noqa: E731
    assert find("a/train-*") == ["1", "2"] and find("a/test-*.jsonl") == ["3"]  # of one split: all of it, whatever it is called
    assert find("a/*.jsonl*") == ["1", "2"] and find("a/*.jsonl*", split="test") == ["3"]  # of two: never both
    assert find("**/x.jsonl") == find("[b]") == ["4"]
    with pytest.raises(UserError, match="no such file or directory.*a pattern"):
        find("c/*.jsonl")


def test_links_to_directories_are_followed_once(tmp_path, config):
    write(tmp_path / "elsewhere" / "x.jsonl", 1)
    write(tmp_path / "data" / "y.jsonl", 2)
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "linked")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "twice")
    os.symlink(tmp_path / "data", tmp_path / "data" / "round")
    assert sorted(golds(load(config(tmp_path / "data")))) == ["1", "2"]


def test_what_is_not_read_is_listed(tmp_path, config):
    for name, n in {"train.jsonl": 1, "test.jsonl": 2}.items():
        write(tmp_path / "d" / name, n)
    for name in ("README.md", "a.txt", ".hidden"):
        (tmp_path / "d" / name).write_text("x")
    unread = ("README.md (no kind of file that is read)", "a.txt (no kind of file that is read)", "test.jsonl (split test)")
    assert load(config(tmp_path / "d")).report()["sources"][0]["unread"] == list(unread)
    report = prepare(config(tmp_path / "d"), helpers.llama(), 0, progress=False).report
    assert report.sources[0].unread == unread and report.to_dict()["sources"][0]["unread"] == unread
    console = Console(width=250, record=True, file=open(os.devnull, "w"))
    console.print(report.table())
    assert f"files not read │ 3 │ {unread[0]}" in " ".join(console.export_text().replace("┃", "│").split())


# ---- what a stock config lacks for one's own data


@pytest.mark.parametrize("rows", [3, 256])
def test_all_that_a_stock_config_lacks_is_said_at_once(rows, tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", *range(rows))
    words = ["--config", "sft", f"data.source={path}", f"run.dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert cli.train(words) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "eval.problems=256 needs problems with answers that are not trained on: set data.eval_source to them" in error
    assert f"; and data.eval_rows=256 leaves nothing to train: {rows} rows of {path}; set data.eval_rows=0 or a smaller" in error
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs" / "sft").exists()  # nothing was tokenized for it


def test_rows_are_counted_only_as_far_as_needed(tmp_path, config):
    path = write(tmp_path / "mine.jsonl", 1, 2, 3)
    with open(path, "a") as file:
        file.write("{damaged")
    assert too_few_rows(config(path, eval_rows=2)) is None and too_few_rows(config(path, eval_rows=0)) is None
    assert "2 rows" in too_few_rows(config(path, eval_rows=2, max_rows=2))
    for other in (config(path, eval_rows=9, eval_source="x"), config("embedded:arithmetic", eval_rows=9)):
        assert too_few_rows(other) is None
