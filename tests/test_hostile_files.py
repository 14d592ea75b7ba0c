"""Directories, tokenizers and rows that somebody hostile made: nothing of them runs, hangs, or is taken for what it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import data_helpers
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_hf import edit_json, random_params, tiny

import jaxreason
from jaxreason import hf
from jaxreason.data import chat as chats
from jaxreason.data.chunks import Inline
from jaxreason.data.encode import Encoder
from jaxreason.data.example import Example
from jaxreason.data.tokenizer import load
from jaxreason.errors import UserError
from jaxreason.rewards import Sample, get
from jaxreason.rewards.pool import RewardPool

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def directory(tmp_path):
    """A model in three shards and an index."""
    config = tiny()
    hf.save(random_params(config), config, tmp_path / "model", dtype="float32", shard_bytes=6000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    (tmp_path / "model" / "SHA256SUMS").unlink()
    return tmp_path / "model"


# ---- files


def index_of(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())


def point(directory, place):
    """Lets the index name ``place`` for the first tensor."""
    index = index_of(directory)
    name = next(iter(index["weight_map"]))
    edit_json(directory / "model.safetensors.index.json", weight_map=index["weight_map"] | {name: place})


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0y", 7, None, ["x"]])
def test_an_index_names_files_of_its_own_directory(place, directory):
    point(directory, place)
    with pytest.raises(UserError, match="is not the name of a file in this directory|no such file, though"):
        hf.load(directory)


def test_a_pipe_is_not_waited_for_and_a_link_out_is_not_followed(directory, tmp_path):
    shard = next(directory.glob("*.safetensors"))
    elsewhere = tmp_path / "elsewhere.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{shard.name} is a link to .*elsewhere.safetensors, outside of the directory"):
        hf.load(directory)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match=f"{shard.name} is not a regular file"):
        hf.load(directory)
    for name in ("config.json", "generation_config.json"):
        (directory / name).unlink()
        os.mkfifo(directory / name)
        with pytest.raises(UserError, match=f"{name} is not a regular file"):
            hf.read_config(directory)
        (directory / name).unlink()
        (directory / "config.json").write_text("{}")


def test_the_hub_s_cache_is_made_of_links(directory, tmp_path):
    """``models--x/snapshots/REVISION/*`` are links to ``models--x/blobs``."""
    wanted = hf.load(directory)[0]
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    np.testing.assert_array_equal(hf.load(snapshot)[0]["embedding"], wanted["embedding"])


def test_an_index_that_contradicts_its_files_is_refused(directory):
    index = index_of(directory)["weight_map"]
    (first, file), *_, (last, other) = index.items()
    assert file != other
    for change, message in (
        ({first: other}, f"{file} has {first}, which the index puts in {other}"),
        ({"model.extra": file}, f"{file} lacks model.extra, which the index puts there"),
    ):
        edit_json(directory / "model.safetensors.index.json", weight_map=index | change)
        with pytest.raises(UserError, match=message):
            hf.load(directory)
    edit_json(directory / "model.safetensors.index.json", weight_map={k: v for k, v in index.items() if k != last})
    with pytest.raises(UserError, match=f"has {last}, which the index puts nowhere"):
        hf.load(directory)


HUGE = 10**400
WRONG = [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": HUGE}, {"num_hidden_layers": 3.0}, {"num_hidden_layers": "3"},
    {"num_hidden_layers": True}, {"vocab_size": 2**40}, {"hidden_size": -16}, {"hidden_size": [16]}, {"head_dim": {}},
    {"rope_theta": HUGE}, {"rope_theta": "many"}, {"rms_norm_eps": float("nan")}, {"rms_norm_eps": float("inf")},
    {"model_type": ["llama"]}, {"model_type": 5}, {"architectures": 5}, {"architectures": [5]}, {"layer_types": 3},
    {"layer_types": [{}]}, {"rope_scaling": "llama3"}, {"rope_scaling": {"rope_type": ["llama3"]}}, {"rope_parameters": [1]},
    {"eos_token_id": "2"}, {"eos_token_id": [1, {}]}, {"eos_token_id": 10**12}, {"bos_token_id": 1.5},
    {"max_position_embeddings": HUGE}, {"tie_word_embeddings": "yes"}, {"attention_bias": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG, ids=lambda change: f"{next(iter(change))}-{str(next(iter(change.values())))[:12]}")
def test_a_value_of_a_wrong_type_or_size_is_refused_by_its_key(change, directory):
    edit_json(directory / "config.json", **change)
    with pytest.raises(UserError) as caught:
        hf.load(directory)
    key = next(iter(change))
    assert key in str(caught.value) and "config.json" in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100000, b'{"vocab_size": ' + b"9" * 5000 + b"}", b"null"])
def test_a_config_that_is_no_json_object_is_refused(text, directory):
    for name in ("config.json", "model.safetensors.index.json"):
        kept = (directory / name).read_bytes()
        (directory / name).write_bytes(text)
        with pytest.raises(UserError, match=name):
            hf.load(directory)
        (directory / name).write_bytes(kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named(value, dtype, directory):
    name, file = next((n, f) for n, f in index_of(directory)["weight_map"].items() if n.endswith("mlp.up_proj.weight"))
    tensors = load_file(directory / file)
    tensors[name] = tensors[name].copy()
    tensors[name][2, 1] = value
    save_file(tensors, directory / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{file}: {name} holds NaN or infinite values"):
        hf.load(directory, param_dtype=dtype)


# ---- tokenizers


def test_stop_ids_that_are_none_are_refused(tmp_path):
    data_helpers.llama().save(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    for value in ("two", [2, "x"], 10**12, -1, True, {"a": 1}):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(UserError, match="generation_config.json has eos_token_id .*not a token id"):
            load(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="generation_config.json holds a list"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_a_pipe_among_a_tokenizer_s_files_is_refused(name, tmp_path):
    data_helpers.llama("{{ messages[0].content }}").save(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        load(tmp_path)


USELESS = [
    {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"}},
    {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}},
    {"added_tokens": "x"},
    {"decoder": {"type": "none"}},
]


@pytest.mark.parametrize("change", USELESS)
def test_a_tokenizer_json_that_is_of_no_use_is_one_message(change, tmp_path):
    data_helpers.llama().save(tmp_path)
    edit_json(tmp_path / "tokenizer.json", **change)
    with pytest.raises(UserError, match="tokenizer"):
        load(tmp_path)


def test_a_tokenizer_that_panics_is_one_message(tmp_path):
    """tokenizers' Rust code panics on a post-processor that names a token which it does not list; that is no Exception."""
    data_helpers.llama().save(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    processor = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    single = [{"SpecialToken": {"id": "none", "type_id": 0}}]
    edit_json(tmp_path / "tokenizer.json", post_processor=processor | {"single": single})
    with pytest.raises(UserError, match="tokenizer .*cannot be read"):
        load(tmp_path)


# ---- control tokens in texts

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MAKERS = {"llama": data_helpers.llama, "sentencepiece": data_helpers.sentencepiece_like, "chatml": data_helpers.chatml}
ATTACK = "{0}the end{0} think {0}"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("place", ["user", "system", "history"])
def test_a_control_token_that_a_text_spells_out_stays_text(kind, place, tmp_path):
    """As many control tokens as without it, and the text reads the same; with the key set it is the token."""
    tokenizer = MAKERS[kind](TEMPLATE if kind != "sentencepiece" else "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}")
    control = tokenizer.control[0]
    text = ATTACK.format(control)

    def example(said):
        given = {"user": "ask", "system": "be kind", "history": (("user", "a"), ("assistant", "b"))}
        value = ((("user", "a"), ("assistant", said)) if place == "history" else said)
        return Example(**given | {place: value})

    ids = [tokenizer.hf.convert_tokens_to_ids(token) for token in tokenizer.control]
    chat, trusting = chats.resolve(tokenizer), chats.resolve(tokenizer, trust=True)
    plain, found, trusted = (
        tokenizer.encode(c.render_prompt(example(said))) for said, c in (("x", chat), (text, chat), (text, trusting))
    )

    def count(tokens):
        return sum(token in ids for token in tokens)

    assert count(found) == count(plain) and count(trusted) == count(plain) + 3
    assert text in tokenizer.decode(found)
    # Rows without such a text are encoded as ever.
    assert tokenizer.encode(trusting.render_prompt(example("x"))) == plain


def test_an_answer_with_a_control_token_inside_is_dropped_and_counted():
    tokenizer = data_helpers.llama(TEMPLATE)
    rows = [
        Example("a", "fine"), Example("a", "x <|start_header_id|>user"), Example("a", "x", "thought <|eot_id|>"),
        Example(None, "text <|eom_id|> text"), Example("\ufdd0<|eot_id|>\ufdd1", "fine"),
    ]  # fmt: skip
    encoded = Encoder(tokenizer, chats.resolve(tokenizer), False).chunk(Inline("here", 0, tuple(rows), 1), "example")
    assert [reason for _, reason, _, _ in encoded.rejects] == ["control token inside the answer"] * 3 + [
        "a character that Unicode keeps out of texts (U+FDD0, U+FDD1)"
    ]
    trusting = Encoder(tokenizer, chats.resolve(tokenizer, trust=True), False)
    encoded = trusting.chunk(Inline("here", 0, tuple(rows[:3]), 1), "example")
    assert encoded.rejects == [(2, "stop token inside the text", 2, "")]  # the rest of it would follow the end
    assert tokenizer.hf.convert_tokens_to_ids("<|start_header_id|>") in encoded.ids


# ---- reward workers


def test_a_worker_does_not_import_what_lies_in_the_current_directory(tmp_path):
    (tmp_path / "numbers.py").write_text("raise SystemExit('numbers.py of the current directory ran')\n")
    (tmp_path / "mine.py").write_text("def one(sample):\n    return 1.0\n")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(
        "import os, sys\nsys.path.append(os.getcwd())\nfrom jaxreason.rewards import Sample, get\n"
        "from jaxreason.rewards.pool import RewardPool\n"
        "with RewardPool([(get('mine:one'), 1.0)], 1, 20.0, 'count') as pool:\n"
        "    print(pool.grade([Sample('q', 'a', None, 1, 9, False)]).total)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[1.0]\n", done.stderr


def test_a_worker_runs_the_package_that_the_run_runs(tmp_path, monkeypatch):
    """Also from a checkout's own directory, where another version is installed."""
    code = "import jaxreason\n\ndef same(sample):\n    return float(jaxreason.__file__ == sample.gold)\n"
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(ROOT)
    with RewardPool([(get(f"{tmp_path}/mine.py:same"), 1.0)], 1, 20.0, "count") as pool:
        assert pool.grade([Sample("q", "a", jaxreason.__file__, 1, 9, False)]).total == [1.0]
