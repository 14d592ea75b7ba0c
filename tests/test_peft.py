"""Adapters against PEFT's own, on a tiny Llama in float32: an exported adapter's logits, a step's gradients, twenty losses.

``python -m pytest tests/test_peft.py -s`` prints the largest differences.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

from jaxreason import hf, losses, model
from jaxreason.model import Adapter, lora
from jaxreason.train.step import make_gradient
from jaxreason.types import Batch, merge

torch.set_num_threads(1)
LOGITS, GRADIENTS, LOSSES, STEPS, RATE = 2e-4, 1e-5, 1e-3, 20, 1e-3
BASE = model.make_config(
    vocab_size=96, embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.2
)
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
KINDS = {
    "lora": Adapter(4, 8.0, TARGETS),
    "rslora": Adapter(16, 2.0, ("q", "v", "down")),  # alpha 8 / sqrt(16)
    "dora": Adapter(4, 2.0, TARGETS, "dora"),
    "tied tables": Adapter(4, 2.0, (*TARGETS, "embedding")),
    "tables": Adapter(4, 2.0, (*TARGETS, "embedding", "head")),
}


def batch_of(seed: int) -> Batch:
    """Four rows of 24 random tokens, all of them trained."""
    ids = np.random.default_rng(seed).integers(0, 96, (4, 25)).astype(np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), (4, 24))
    ones = np.ones((4, 24), np.int32)
    return jax.tree.map(jnp.asarray, Batch(ids[:, :-1], ids[:, 1:], positions, ones, ones.astype(np.float32)))


def torch_loss(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits = network(torch.tensor(np.asarray(batch.tokens), dtype=torch.long)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(np.asarray(batch.targets)).long().flatten())


def theirs_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's trainable parameters by the names that its files have."""
    named = ((name.replace(".default", ""), p) for name, p in network.named_parameters() if p.requires_grad)
    return {name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): p for name, p in named}


def compared(tree: dict, theirs: dict[str, np.ndarray], config: model.ModelConfig) -> float:
    """The largest difference between a tree of ours and values by PEFT's names; every one is compared."""
    ours = hf.peft_tensors(tree, config)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def drawn(plain: model.ModelConfig, config: model.ModelConfig) -> tuple[dict, dict]:
    """A model, and adapters of which no leaf is zero."""
    params = model.init(plain, jax.random.key(0))
    leaves, tree = jax.tree.flatten(lora.with_magnitudes(model.init_adapters(config, jax.random.key(1)), params))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return params, jax.tree.unflatten(tree, [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.mark.parametrize("name", KINDS)
def test_adapters_are_those_of_peft(name: str, tmp_path: Path) -> None:
    adapter = KINDS[name]
    plain = BASE.replace(tie_embeddings="head" not in adapter.targets)
    config = dataclasses.replace(plain, adapter=adapter)
    params, adapters = jax.jit(drawn, static_argnums=(0, 1))(plain, config)
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    hf.save(params, plain, base_dir, dtype="float32")
    hf.save_adapters(adapters, config, str(adapter_dir), str(base_dir))
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    network = peft.PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)

    batch = batch_of(0)
    ours = np.asarray(jax.jit(model.logits, static_argnums=1)(merge(params, adapters), config, batch.tokens))
    theirs = network(torch.tensor(np.asarray(batch.tokens)).long()).logits.detach().numpy()
    logits = float(np.abs(ours - theirs).max())

    if name == "tied tables":  # PEFT trains its head's copy apart, with a gradient of its own
        print(f"{name}: logits {logits:.1e}")
        assert logits < LOGITS, f"{name}: logits differ by {logits}, more than {LOGITS}"
        return
    optimizer, gradient = optax.adam(RATE), make_gradient(config, losses.get("nll"), 1)

    @jax.jit
    def step(adapters, state, batch):
        value, _, grads, _ = gradient(adapters, batch, frozen=params)
        updates, state = optimizer.update(grads, state)
        return value, grads, optax.apply_updates(adapters, updates), state

    state = optimizer.init(adapters)
    _, grads, _, _ = step(adapters, state, batch)
    torch_loss(network, batch).backward()
    trained = theirs_of(network)
    slopes = compared(grads, {key: p.grad.numpy() for key, p in trained.items()}, config)

    steps, apart = torch.optim.Adam(trained.values(), RATE), 0.0
    for seed in range(STEPS):
        batch = batch_of(seed % 3)
        value, _, adapters, state = step(adapters, state, batch)
        steps.zero_grad()
        loss = torch_loss(network, batch)
        loss.backward()
        steps.step()
        apart = max(apart, abs(float(value) - loss.item()))
    last = f"the last {float(value):.3f}"
    print(f"{name}: logits {logits:.1e}, gradients {slopes:.1e}, losses of {STEPS} steps {apart:.1e}, {last}")
    for what, found, bound in (("logits", logits, LOGITS), ("gradients", slopes, GRADIENTS), ("losses", apart, LOSSES)):
        assert found < bound, f"{name}: {what} differ by {found}, more than {bound}"

