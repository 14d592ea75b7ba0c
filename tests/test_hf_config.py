"""config.json in both of transformers' spellings, there and back, and every value that the model cannot be."""

import json

import pytest
import transformers

from jaxreason import hf, model
from jaxreason.errors import UserError

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
RAW = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip


CONFIG = model.make_config(
    vocab_size=40, embed_dim=16, mlp_dim=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, norm_eps=3e-6,
    tie_embeddings=False, attention_bias=True,
)  # fmt: skip


def test_both_spellings_of_rope_agree():
    old = RAW | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    older = RAW | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    new = RAW | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    assert hf.config_from_hf(old, "c") == hf.config_from_hf(new, "c") == hf.config_from_hf(old | new, "c")
    assert hf.config_from_hf(new, "c").arch.rope_scaling == model.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert hf.config_from_hf(older, "c").arch.rope_scaling == model.RopeScaling("linear", 2.0)
    assert hf.config_from_hf(RAW | {"rope_theta": 7e4, "rope_scaling": None}, "c").arch.rope_theta == 7e4


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_absent_keys_mean_what_transformers_means(kind):
    """32 heads, since Qwen's configs have 32 key-value heads where none are given; null means as many as heads."""
    raw = {"model_type": kind, "vocab_size": 40, "hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 3,
           "num_attention_heads": 32}  # fmt: skip
    for more in ({}, {"num_key_value_heads": None}):
        wanted, found = transformers.AutoConfig.for_model(**raw | more), hf.config_from_hf(raw | more, "c").arch
        assert found.family == kind
        assert found.num_kv_heads == wanted.num_key_value_heads
        assert found.head_dim == getattr(wanted, "head_dim", 64 // 32)
        assert found.rope_theta == wanted.rope_parameters["rope_theta"] == 10000.0
        assert found.norm_eps == wanted.rms_norm_eps
        assert found.tie_embeddings is wanted.tie_word_embeddings is False
        assert found.max_positions == wanted.max_position_embeddings
        assert found.bos_id == wanted.bos_token_id
        assert found.stop_ids == (() if wanted.eos_token_id is None else (wanted.eos_token_id,))


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; only full causal"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True; only full causal"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types has sliding_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling has rope_type 'yarn'"),
        ("qwen2", {"architectures": ["LlamaForCausalLM"]}, "give a Qwen2ForCausalLM checkpoint"),
        ("mixtral", {}, "model_type is 'mixtral'; implemented are llama, qwen2, qwen3"),
    ],
)
def test_what_a_family_cannot_be_is_named(kind, change, words):
    allowed = {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 2, "rope_scaling": None}
    raw = RAW | {"model_type": kind} | (allowed if kind.startswith("qwen") else {})
    with pytest.raises(UserError, match=words):
        hf.config_from_hf(raw | change, "some/config.json")
    if kind.startswith("qwen"):
        assert hf.config_from_hf(raw, "c").arch.family == kind


def test_stop_ids_come_from_both_files():
    assert hf.config_from_hf(RAW, "c").arch.stop_ids == (2,)
    assert hf.config_from_hf(RAW, "c", {"eos_token_id": [9, 2]}).arch.stop_ids == (9, 2)
    assert hf.config_from_hf(RAW | {"eos_token_id": [4, 9]}, "c", {"eos_token_id": 9}).arch.stop_ids == (9, 4)
    assert hf.config_from_hf(RAW | {"eos_token_id": None, "bos_token_id": None}, "c").arch.stop_ids == ()


@pytest.mark.parametrize(
    "scaling", [None, model.RopeScaling("linear", 4.0), model.RopeScaling("llama3", 8.0, 2.0, 3.0)]
)
@pytest.mark.parametrize("stop_ids", [(), (5,), (5, 3)])
def test_configs_survive_the_way_out_and_back(scaling, stop_ids):
    config = CONFIG.replace(rope_scaling=scaling, stop_ids=stop_ids)
    written = json.loads(json.dumps(hf.config_to_hf(config, "float32")))
    assert hf.config_from_hf(written, "c") == config
    # transformers 4 does not know the one, and a later one may forget the others
    for unread in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        assert hf.config_from_hf({k: v for k, v in written.items() if k not in unread}, "c") == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling has rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling has rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks low_freq_factor"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "attention_factor 2.0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "disagree"),
        ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 8.0}}, "disagree"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"eos_token_id": [2, "</s>"]}, "eos_token_id has '</s>'"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    ],
)
def test_configs_beyond_the_model_are_named(change, words):
    with pytest.raises(UserError, match=words) as caught:
        hf.config_from_hf(RAW | change, "some/config.json")
    assert "some/config.json" in str(caught.value) or "num_kv_heads" in words
