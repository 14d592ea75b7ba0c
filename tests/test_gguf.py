"""Files for llama.cpp: its way of splitting text against ours on the task, tensors and keys as its reader finds them, refusals.

``tests/opens.py --llama-cpp`` asks llama.cpp itself.
"""

import itertools
import sys
import types

import gguf
import jax
import numpy as np
import pytest
from data_helpers import llama

from jaxreason import cli, hf, model
from jaxreason.data.embedded.arithmetic import Arithmetic, generate
from jaxreason.data.tokenizer import load
from jaxreason.errors import UserError
from jaxreason.hf import gguf as files
from jaxreason.model import presets

TOKENIZER = load("embedded")
TEXTS, KINDS = files.vocabulary(TOKENIZER, 386)
CONFIG = presets.preset("embedded-tiny")


def split_as_llama_cpp(text: str) -> list[int]:
    """Its tokenizer_st_partition: the longest declared text first, wherever it is; what is left is bytes, here of ASCII."""
    spelled = {chr(code): TOKENIZER.encode(chr(code))[0] for code in range(128)}
    declared = [token for token in range(386) if KINDS[token] in ("USER_DEFINED", "CONTROL")]
    parts: list[str | int] = [text]
    for token in sorted(declared, key=lambda token: -len(TEXTS[token])):
        cut: list[str | int] = []
        for part in parts:
            pieces = [part] if isinstance(part, int) else part.split(TEXTS[token])
            for at, piece in enumerate(pieces):
                cut += [token, piece] if at else [piece]
        parts = cut
    return [token for part in parts for token in ([part] if isinstance(part, int) else [spelled[each] for each in part])]


def test_words_of_the_task_are_declared_and_bytes_are_not():
    assert (TEXTS[0], KINDS[0]) == ("!", "NORMAL")
    assert (TEXTS[220], KINDS[220]) == ("Ġ", "NORMAL")  # the space, as GPT-2 prints that byte
    assert (TEXTS[305], KINDS[305]) == (" has ", "USER_DEFINED")
    assert (TEXTS[340], KINDS[340]) == ("<think>", "USER_DEFINED")
    assert (TEXTS[347], KINDS[347]) == ("<|eot_id|>", "CONTROL")
    assert (TEXTS[385], KINDS[385]) == ("[PAD385]", "UNUSED")  # a row of the embedding without a token
    assert KINDS.count("NORMAL") == 256 and len(set(TEXTS)) == 386


def test_the_task_gets_the_ids_of_training_and_other_texts_may_not():
    examples = list(itertools.islice(generate(Arithmetic(operations=4, careful=0.5), "eval", 3), 300))
    texts = [f"<|eot_id|>user\n\n{each.user}<|eot_id|><think>\n{each.think}\n</think>\n\n{each.answer}" for each in examples]
    assert [split_as_llama_cpp(text) for text in texts] == TOKENIZER.encode_batch(texts)
    assert TOKENIZER.encode("a, b") == [64, 11, 220, 65]  # ", " is a token before a digit only
    assert split_as_llama_cpp("a, b") == [64, 256, 65]


def test_rows_of_queries_and_keys_are_neighbours():
    """One head of four channels: the pairs (0, 2) and (1, 3) come to be (0, 1) and (2, 3)."""
    config = CONFIG.replace(head_dim=4)
    rows = np.arange(8.0)[:, None] * np.ones((1, 3))
    assert files._pairs(rows, "model.layers.0.self_attn.q_proj.weight", config)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert files._pairs(rows[:, 0], "model.layers.0.self_attn.k_proj.bias", config).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert files._pairs(rows, "model.layers.0.self_attn.v_proj.weight", config)[:, 0].tolist() == list(range(8))


def test_factors_of_the_rope_by_hand():
    """A wavelength of 2π is kept, one of 2π·500000^(15/16), above 8192, is 32 times as long, and that of i = 8 is between.

    Its wavelength is w = 2π·500000^(1/2) = 4442.88, so s = (8192 / w - 1) / 3 = 0.281279 and the factor 1 / ((1 - s) / 32 + s).
    """
    factors = files.rope_factors(CONFIG)
    assert factors.dtype == np.float32 and factors.shape == (16,)
    np.testing.assert_allclose(factors[[0, 8, 15]], [1, 3.2924, 32], rtol=1e-4)


def test_a_file_as_its_reader_finds_it(tmp_path):
    params = jax.tree.map(np.asarray, model.init(CONFIG, jax.random.key(0)))
    files.save_gguf(params, CONFIG, tmp_path / "model.gguf", TOKENIZER, "run")
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor.data for tensor in read.tensors}
    assert len(found) == 2 + 9 * 4 + 1  # embedding, last norm; seven matrices and two norms a layer; factors of the rope
    np.testing.assert_array_equal(found["token_embd.weight"], params["embedding"])
    np.testing.assert_array_equal(found["blk.3.ffn_down.weight"], params["layers"]["mlp"]["down"]["kernel"][3].T)
    np.testing.assert_array_equal(found["blk.1.attn_q.weight"][1], params["layers"]["attention"]["q"]["kernel"][1].T[16])
    fields = {name: field.contents() for name, field in read.fields.items()}
    wanted = {
        "general.architecture": "llama", "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 500000.0,
        "llama.context_length": 131072, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.bos_token_id": 342,
        "tokenizer.ggml.eos_token_id": 347, "tokenizer.ggml.padding_token_id": 348, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TOKENIZER.hf.chat_template, "tokenizer.ggml.tokens": TEXTS[:384],
    }  # fmt: skip
    assert {key: fields[key] for key in wanted} == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    with pytest.raises(UserError, match="model.gguf exists; give another path"):
        files.save_gguf(params, CONFIG, tmp_path / "model.gguf", TOKENIZER, "run")


def test_the_command_writes_what_a_checkpoint_holds(tmp_path, capsys):
    params = jax.tree.map(np.asarray, model.init(CONFIG, jax.random.key(0)))
    hf.save(params, CONFIG, tmp_path / "export", "float32", TOKENIZER)
    assert cli.convert(["from-hf", str(tmp_path / "export"), str(tmp_path / "run")]) == 0
    assert cli.convert(["to-gguf", str(tmp_path / "run"), str(tmp_path / "model.gguf")]) == 0
    assert "open it with llama.cpp" in capsys.readouterr().out
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    np.testing.assert_array_equal(found["token_embd.weight"], params["embedding"])
    assert cli.convert(["to-gguf", str(tmp_path / "export"), str(tmp_path / "other.gguf")]) == 0
    same = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "other.gguf").tensors}
    assert found.keys() == same.keys() and all(np.array_equal(found[name], same[name]) for name in found)
    assert cli.convert(["to-gguf", str(tmp_path / "run"), str(tmp_path / "model.gguf")]) == 2
    assert "model.gguf exists" in capsys.readouterr().err


def test_what_llama_cpp_converts_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    with pytest.raises(UserError, match=r"another tokenizer than the embedded one; give its Hugging Face directory \(of a run"):
        files.save_gguf({}, CONFIG, tmp_path / "a", llama(), "run")
    sizes = dict(vocab_size=384, embed_dim=16, mlp_dim=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16)
    qwen = model.make_config("qwen2", **sizes)
    with pytest.raises(UserError, match="GGUF of family qwen2; give its Hugging Face directory"):
        files.save_gguf({}, qwen, tmp_path / "a", TOKENIZER, "run")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install -e '.\[gguf\]'"):
        files.save_gguf({}, CONFIG, tmp_path / "a", TOKENIZER, "run")
