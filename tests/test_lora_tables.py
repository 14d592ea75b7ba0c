"""Adapters of the embedding and the head, tied and apart: against a model whose tables are changed, and in PEFT's files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_lora import CONFIG, NLL, UNPACKED, init, logits, moved

from jaxreason import config as cfg
from jaxreason import hf, model
from jaxreason.errors import UserError
from jaxreason.model import Adapter, lora
from jaxreason.model.flops import weight_flops_per_token
from jaxreason.model.vocab import head_stats
from jaxreason.sharding import batch_sharding, make_mesh, replicated, shardings
from jaxreason.train import state as states
from jaxreason.train.step import make_gradient
from jaxreason.types import merge

TABLES = {True: ("q", "embedding"), False: ("q", "embedding", "head")}


def of(tied: bool) -> tuple[model.ModelConfig, dict, dict]:
    """(config, the model's own parameters, adapters away from their start)"""
    plain = CONFIG.replace(tie_embeddings=tied)
    config = dataclasses.replace(plain, adapter=Adapter(4, 2.0, TABLES[tied]))
    return config, init(plain, jax.random.key(1)), moved(model.init_adapters(config, jax.random.key(2)))


@pytest.mark.parametrize("tied", [True, False])
def test_they_begin_as_the_model_and_compute_what_changed_tables_do(tied):
    """The twin writes W + 2 B A by itself; tied tables are one, on both sides."""
    config, params, adapters = of(tied)
    plain = dataclasses.replace(config, adapter=None)
    start = states.draw_adapters(config, params, make_mesh(cfg.Mesh(), jax.devices()[:1]), seed=0)
    assert set(start) == ({"layers", "embedding_lora"} if tied else {"layers", "embedding_lora", "head_lora"})
    assert not start["embedding_lora"]["lora_b"].any() and start["embedding_lora"]["lora_a"].any()
    np.testing.assert_allclose(logits(merge(params, start), config), logits(params, plain), atol=1e-6)

    def twin(adapters):
        whole = {**params, "layers": lora.merged(merge(params, {"layers": adapters["layers"]}), config.adapter)["layers"]}
        for name in TABLES[tied][1:]:
            leaves = adapters[f"{name}_lora"]
            whole[name] = params[name] + 2.0 * leaves["lora_b"] @ leaves["lora_a"]
        return whole

    def loss(adapters):
        logp = jax.nn.log_softmax(model.logits(twin(adapters), plain, UNPACKED.tokens, None, UNPACKED.segment_ids))
        picked = jnp.take_along_axis(logp, UNPACKED.targets[..., None], -1)[..., 0]
        return -jnp.sum(picked * UNPACKED.loss_mask) / jnp.sum(UNPACKED.loss_mask)

    merged = lora.merged(merge(params, adapters), config.adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, twin(adapters))
    decoding = model.unstack(merge(params, adapters), config)
    np.testing.assert_allclose(decoding["embedding"], merged["embedding"], atol=1e-6)
    assert "embedding_lora" not in decoding
    expected, wanted = jax.jit(jax.value_and_grad(loss))(adapters)
    value, _, grads, _ = jax.jit(make_gradient(config, NLL, 2))(adapters, UNPACKED, frozen=params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), grads, wanted)
    mesh = make_mesh(cfg.Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(tree, shardings(tree, mesh)) for tree in (adapters, params)]
        gradient = jax.jit(make_gradient(config, NLL, 2), out_shardings=replicated(mesh))
        found = gradient(placed[0], jax.device_put(UNPACKED, batch_sharding(mesh)), None, 0, placed[1])
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), found[2], wanted)
    b = placed[0]["embedding_lora"]["lora_b"]
    assert b.addressable_shards[0].data.shape == (b.shape[0] // 2, 4)  # [V / tensor, r]


def test_no_program_forms_the_logits_of_all_tokens():
    """The largest array of a step has fewer elements than B·T·V where the head goes by chunks."""
    config, params, adapters = of(False)
    config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, targets=("head",)))
    adapters = {"head_lora": adapters["head_lora"]}

    def step(adapters):
        x = model.hidden(merge(params, adapters), config, UNPACKED.tokens)
        head = model.head_kernel(merge(params, adapters), config)
        return head_stats(x, head, UNPACKED.targets, budget=512).logp.sum()

    text = jax.jit(jax.grad(step)).lower(adapters).as_text()
    rows, vocab = UNPACKED.tokens.size, CONFIG.arch.vocab_size
    assert f"tensor<{rows}x{vocab}x" not in text and f"tensor<{'x'.join(map(str, UNPACKED.tokens.shape))}x{vocab}x" not in text


@pytest.mark.parametrize("tied", [True, False])
def test_pefts_names_both_ways(tied, tmp_path):
    config, _, adapters = of(tied)
    out = tmp_path / "peft"
    hf.save_adapters(adapters, config, str(out), "base")
    tensors = load_file(out / "adapter_model.safetensors")
    said = json.loads((out / "adapter_config.json").read_text())
    name, leaves = "base_model.model.model.embed_tokens.", adapters["embedding_lora"]
    np.testing.assert_array_equal(tensors[name + "lora_embedding_A"], leaves["lora_b"].T)
    np.testing.assert_array_equal(tensors[name + "lora_embedding_B"], leaves["lora_a"].T)
    if not tied:
        np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_B.weight"], adapters["head_lora"]["lora_b"])
        np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_A.weight"], adapters["head_lora"]["lora_a"])
    assert said["ensure_weight_tying"] is tied
    assert said["target_modules"] == ["embed_tokens", *([] if tied else ["lm_head"]), "q_proj"]
    (out / "SHA256SUMS").unlink()
    # PEFT adds the table itself.
    more, table, head = {}, np.zeros((2, 2), np.float32), "base_model.model.lm_head."
    if tied:  # and for the head the same adapter again
        own = {"lora_A.weight": leaves["lora_a"], "lora_B.weight": leaves["lora_b"]}
        more = {head + key: value for key, value in (own | {"base_layer.weight": table}).items()}
    more = {key: np.asarray(value) for key, value in more.items()}
    save_file(tensors | more | {name + "base_layer.weight": table}, out / "adapter_model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hf.load_adapters(str(out), config), adapters)
    if tied:
        more[head + "lora_B.weight"] = more[head + "lora_B.weight"] + 1
        save_file(tensors | more, out / "adapter_model.safetensors")
        with pytest.raises(UserError, match="lm_head has an adapter of its own"):
            hf.load_adapters(str(out), config)
        (out / "adapter_config.json").write_text(json.dumps(said | {"ensure_weight_tying": False}))
        with pytest.raises(UserError, match="changes the embedding but not the head"):
            hf.load_adapters(str(out), config)


def test_what_does_not_combine_is_refused_by_name():
    with pytest.raises(UserError, match="lora.targets: this model's head is its embedding"):
        lora.check(model.shapes(CONFIG.replace(tie_embeddings=True)), Adapter(4, 2.0, ("head",)))
    with pytest.raises(UserError, match="lora.kind dora is of layers' matrices: leave head out"):
        start = ["model.preset=null", "model.weights=runs/sft", "lora.rank=4"]
        cfg.load("sft", [*start, "lora.kind=dora", "lora.targets=[q, head]"])


def test_a_row_that_is_looked_up_is_no_product():
    """Untied, rank 4: q 2·4·(32 + 32), the embedding's A 4·32, the head's 4·(32 + V)."""
    config, _, _ = of(False)
    vocab = CONFIG.arch.vocab_size
    plain = dataclasses.replace(config, adapter=None)
    assert weight_flops_per_token(config) == weight_flops_per_token(plain) / 6 * 4 + 6 * (512 + 128 + 4 * (32 + vocab))
