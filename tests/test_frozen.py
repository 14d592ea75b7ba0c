"""Supervised losses that compare with another model: both heads in chunks, and the step around them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import CONFIG, PACKED, UNPACKED

from jaxreason import config as cfg
from jaxreason import losses, model
from jaxreason.losses import distill
from jaxreason.model.chunked import from_logits
from jaxreason.sharding import batch_sharding, make_mesh, replicated, shardings
from jaxreason.train.step import Noise, make_gradient

B, T, V = 2, 24, 101
LOSSES = {
    "asft": {}, "sft_kl": {}, "iw_sft": {}, "eaft": {}, "rho1": {}, "psft": {}, "forward_kl": {"nll_coef": 0.2}, "reverse_kl": {},
    "jsd": {"beta": 0.3, "temperature": 2.0}, "adaptive_kl": {}, "skew_reverse_kl": {"top_k": 7},
}  # fmt: skip
OTHER = CONFIG.replace(embed_dim=16, num_heads=2, num_layers=1)  # of the same vocabulary, another width
FROZEN = model.init(OTHER, jax.random.key(7))
PARAMS = model.init(CONFIG, jax.random.key(1))


@pytest.mark.parametrize("budget", [2**20, V * 10])
@pytest.mark.parametrize(("name", "options"), [("forward_kl", {}), ("reverse_kl", {"temperature": 3.0}),
                                               ("jsd", {"beta": 0.2}), ("jsd", {"beta": 0.0})])  # fmt: skip
def test_chunks_of_both_heads_equal_full_logits(name, options, budget):
    """Heads of width 16 and 12: value, and gradients by the student's states and table; the chunk divides nothing."""
    keys = jax.random.split(jax.random.key(0), 6)
    x, w = jax.random.normal(keys[0], (B, T, 16)), jax.random.normal(keys[1], (V, 16))
    x_t, w_t = jax.random.normal(keys[2], (B, T, 12)), jax.random.normal(keys[3], (V, 12))
    targets, weight = jax.random.randint(keys[4], (B, T), 0, V), jax.random.normal(keys[5], (B, T))
    divergence = losses.get(name, **options).divergence

    def ours(x, w):
        found = from_logits(lambda y, z, other: {"d": divergence(z, other)}, targets, ((x, w), (x_t, w_t)), budget)
        return jnp.sum(weight * found["d"])

    def plain(x, w):
        student, teacher = x @ w.T, x_t @ w_t.T
        scale = options.get("temperature", 1.0)
        p, q = jax.nn.softmax(teacher / scale), jax.nn.softmax(student / scale)
        beta = options.get("beta")
        m = None if beta is None else beta * p + (1 - beta) * q
        parts = {
            "forward_kl": lambda: (p * jnp.log(p / q)).sum(-1),
            "reverse_kl": lambda: (q * jnp.log(q / p)).sum(-1),
            "jsd": lambda: (p * jnp.log(p / q)).sum(-1) if beta == 0 else (
                beta * p * jnp.log(p / m) + (1 - beta) * q * jnp.log(q / m)).sum(-1),
        }  # fmt: skip
        return jnp.sum(weight * parts[name]())

    (value, grads), (twin, twin_grads) = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, w) for f in (ours, plain))
    np.testing.assert_allclose(value, twin, rtol=1e-4)
    for a, b in zip(grads, twin_grads):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_no_array_of_all_tokens_by_the_vocabulary():
    """4,096 tokens by 5,003 entries, in tiles of at most 2^17 elements: the compiled backward pass holds no more."""
    rows, vocabulary, budget = 4096, 5003, 2**17
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, rows, 8), (vocabulary, 8), (1, rows, 8), (vocabulary, 8))]

    def loss(x, w, x_t, w_t):
        targets = jnp.zeros((1, rows), jnp.int32)
        return jnp.sum(from_logits(lambda y, z, o: distill.forward_kl(z, o), targets, ((x, w), (x_t, w_t)), budget))

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * rows * vocabulary / 4


def gradient(name: str, batch, count: int, noise=None, mesh=None):
    needed = losses.get(name, **LOSSES.get(name, {}))
    compared = not needed.needs.isdisjoint({"ref_logp", "ref_kl", "teacher_divergence"})
    function = make_gradient(CONFIG, needed, count, 1.0, OTHER if compared else None, noise)
    frozen = FROZEN if compared else None
    if mesh is None:
        return jax.jit(function)(PARAMS, batch, frozen, 3)[:3]
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings(PARAMS, mesh))
        frozen = frozen and jax.device_put(FROZEN, shardings(FROZEN, mesh))
        placed = jax.device_put(batch, batch_sharding(mesh))
        return jax.jit(function, out_shardings=replicated(mesh))(params, placed, frozen, 3)[:3]


def assert_close(found, wanted, tolerance=1e-6):
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == wanted[1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=1e-5), found[2], wanted[2])


@pytest.mark.parametrize("name", LOSSES)
def test_the_split_into_microbatches_and_over_devices_changes_nothing(name):
    """Unequal sequences, packed and alone. One loss of each kind of need: eight devices, with the tables split both ways."""
    whole = gradient(name, UNPACKED, 1)
    assert np.isfinite(whole[0]) and any(np.any(g) for g in jax.tree.leaves(whole[2]))
    assert_close(gradient(name, PACKED, 2), whole)
    if name in ("asft", "iw_sft", "eaft", "jsd"):
        assert_close(gradient(name, UNPACKED, 2, mesh=make_mesh(cfg.Mesh(data=2, fsdp=2, tensor=2))), whole)


def test_a_loss_over_whole_logits_equals_the_one_pass_head_where_the_comparison_weighs_nothing():
    plain = gradient("nll", UNPACKED, 1)
    one = jax.jit(make_gradient(CONFIG, losses.get("sft_kl", kl_coef=0.0), 1, 1.0, OTHER))(PARAMS, UNPACKED, FROZEN)[:3]
    np.testing.assert_allclose(one[0], plain[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one[2], plain[2])


def test_a_model_compared_with_itself_has_no_divergence():
    for name in ("forward_kl", "jsd"):
        function = make_gradient(CONFIG, losses.get(name), 1, 1.0, CONFIG)
        value, _, grads, _ = jax.jit(function)(PARAMS, UNPACKED, PARAMS)
        np.testing.assert_allclose(value, 0.0, atol=1e-6)
        jax.tree.map(lambda g: np.testing.assert_allclose(g, 0.0, atol=1e-6), grads)


def test_noise_belongs_to_the_row_of_the_step_and_to_nothing_else():
    noise = Noise(5.0, seed=2)
    whole = gradient("nll", UNPACKED, 1, noise)
    assert_close(gradient("nll", UNPACKED, 4, noise), whole)
    assert_close(gradient("nll", UNPACKED, 2, noise, make_mesh(cfg.Mesh(fsdp=4, data=2))), whole)
    quiet = gradient("nll", UNPACKED, 1)
    assert abs(float(whole[0] - quiet[0])) > 1e-3
    batch = dataclasses.replace(UNPACKED, sequence_ids=np.arange(8)[:, None] * 12 + UNPACKED.segment_ids)
    drawn = [noise.of(step, batch, 32) for step in (3, 3, 4)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.all(np.abs(np.asarray(drawn[0] - drawn[2])).max((1, 2)) > 0)
    assert len({float(row[0, 0]) for row in drawn[0]}) == 8


def test_token_weights_weigh_by_hand():
    """Twice the weight on every target is twice the loss; the reported nll stays."""
    doubled = dataclasses.replace(UNPACKED, token_weights=jnp.full(UNPACKED.tokens.shape, 2.0))
    for name in ("nll", "asft"):
        one, two = gradient(name, UNPACKED, 2), gradient(name, doubled, 2)
        np.testing.assert_allclose(two[0], 2 * one[0], rtol=1e-6)
        np.testing.assert_allclose(two[1]["nll"], one[1]["nll"], rtol=1e-6)
