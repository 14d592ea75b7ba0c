"""One optimizer step: the same parameters however the batch is cut, and everything moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreason import config as cfg
from jaxreason import losses, model
from jaxreason.sharding import make_mesh
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.step import batch_loss, make_gradient, make_train_step, microbatches, totals_of
from jaxreason.types import Batch, count_unique

CONFIG = model.make_config(
    vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.2
)
LENGTHS = [12, 5, 9, 3, 7, 12, 4, 8]


def rows(groups: list[list[int]], length: int, count: int) -> Batch:
    """Examples (by index into LENGTHS) laid into rows; example i has the same tokens wherever it stands."""
    fields = {n: np.zeros((count, length), np.int32) for n in ("tokens", "targets", "positions", "segment_ids")}
    mask = np.zeros((count, length), np.float32)
    for r, group in enumerate(groups):
        start = 0
        for segment, example in enumerate(group, 1):
            n = LENGTHS[example]
            ids = np.random.default_rng(example).integers(0, 64, n + 1)
            at = slice(start, start + n)
            fields["tokens"][r, at], fields["targets"][r, at] = ids[:-1], ids[1:]
            fields["positions"][r, at], fields["segment_ids"][r, at] = np.arange(n), segment
            mask[r, start + 2 : start + n] = 1
            start += n
    return Batch(**{k: jnp.asarray(v) for k, v in fields.items()}, loss_mask=jnp.asarray(mask))


UNPACKED = rows([[i] for i in range(8)], 12, 8)
PACKED = rows([[0, 1], [2, 3, 6], [4, 7], [5]], 18, 4)


def one_step(batch, count, loss="nll", **options):
    mesh = make_mesh(cfg.Mesh(), jax.devices()[:1])
    settings = cfg.Optimizer(learning_rate=1e-2, schedule="constant", weight_decay=0.1, max_grad_norm=0.5)
    optimizer = opt.make(settings, 10)
    state = states.create(CONFIG, optimizer, mesh, seed=1)
    step = make_train_step(CONFIG, losses.get(loss, **options), optimizer, opt.schedule(settings, 10), count)
    return jax.jit(step)(state, batch)[:2]


@pytest.fixture(scope="module")
def whole():
    return one_step(UNPACKED, 1)


def assert_same(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=0), a.params, b.params)


@pytest.mark.parametrize(("batch", "count"), [(UNPACKED, 8), (UNPACKED, 4), (UNPACKED, 2), (PACKED, 1), (PACKED, 4)])
def test_microbatches_and_packing_change_nothing(whole, batch, count):
    state, metrics = one_step(batch, count)
    # Adam's first step is sign-like, so compare the gradients too: they carry the magnitudes.
    np.testing.assert_allclose(metrics["loss"], whole[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["leaf_norms"], whole[1]["leaf_norms"], rtol=1e-5)
    assert_same(state, whole[0], 1e-6)


@pytest.mark.parametrize("remat", ["none", "full", "matmuls"])
@pytest.mark.parametrize("count", [1, 4])
def test_layers_written_out_have_the_gradient_of_a_loop_over_them(remat, count):
    def gradient(scan: bool):
        config = CONFIG.replace(remat=remat, scan_layers=scan)
        return jax.jit(make_gradient(config, losses.get("nll"), count))(model.init(CONFIG, jax.random.key(1)), PACKED)

    (value, _, looped, _), (other, _, written_out, _) = gradient(True), gradient(False)
    assert float(value) == float(other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=0), looped, written_out)


def test_casting_layers_once_gives_the_gradient_of_casting_in_every_product():
    config = CONFIG.replace(compute_dtype="bfloat16", remat="matmuls")
    params, nll = model.init(CONFIG, jax.random.key(1)), losses.get("nll")
    batch = dataclasses.replace(PACKED, sequence_ids=jnp.arange(4)[:, None] * 18 + PACKED.segment_ids)

    def plain(params):
        """Each microbatch's gradient with respect to the float32 parameters, added up."""
        parts = [jax.tree.map(lambda x, i=i: x[i], microbatches(batch, 2)) for i in range(2)]
        grads = [jax.grad(lambda p, m=m: batch_loss(p, config, nll, m, totals_of(batch))[0])(params) for m in parts]
        return jax.tree.map(jnp.add, *grads)

    _, _, found, _ = jax.jit(make_gradient(config, nll, 2))(params, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), found, jax.jit(plain)(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_first_step_moves_every_parameter(whole):
    start = states.create(CONFIG, optax.identity(), make_mesh(cfg.Mesh(), jax.devices()[:1]), seed=1)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), start.params, whole[0].params)
    assert all(jax.tree.leaves(moved)), moved


def test_loss_is_the_mean_over_trained_tokens(whole):
    start = states.create(CONFIG, optax.identity(), make_mesh(cfg.Mesh(), jax.devices()[:1]), seed=1)
    log_p = jax.nn.log_softmax(model.logits(start.params, CONFIG, UNPACKED.tokens))
    picked = np.take_along_axis(np.asarray(log_p), np.asarray(UNPACKED.targets)[..., None], -1)[..., 0]
    trained = sum(n - 2 for n in LENGTHS)
    np.testing.assert_allclose(whole[1]["loss"], -(picked * UNPACKED.loss_mask).sum() / trained, rtol=1e-5)
    assert whole[1]["tokens"] == trained


def test_totals_count_sequences_in_packed_rows():
    totals = totals_of(PACKED)
    assert (float(totals.tokens), float(totals.sequences)) == (sum(n - 2 for n in LENGTHS), 8.0)
    truncated = totals_of(dataclasses.replace(PACKED, loss_mask=PACKED.loss_mask.at[3].set(0.0)))  # masked, but drawn
    assert (float(truncated.sequences), float(truncated.drawn)) == (7.0, 8.0)


def test_count_unique_by_hand():
    ids, mask = jnp.array([3, 3, 0, 7, 7, 9]), jnp.array([1, 1, 1, 0, 1, 0.0])
    assert count_unique(ids, mask) == 3.0


def test_schedules_by_hand():
    at = lambda **k: [float(opt.schedule(cfg.Optimizer(learning_rate=1.0, **k), 6)(i)) for i in range(6)]  # noqa: E731
    np.testing.assert_allclose(at(schedule="constant", warmup_steps=2), [0.5, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(at(schedule="linear"), [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rtol=1e-6)
    np.testing.assert_allclose(at(schedule="cosine", warmup_steps=2, final_fraction=0.1),
                               [0.5, 1, 1, 0.1 + 0.45 * (1 + np.cos(np.pi / 4)), 0.55, 0.1 + 0.45 * (1 - np.cos(np.pi / 4))],
                               rtol=1e-6)  # fmt: skip


def test_adamw_by_hand():
    """Two steps of one weight and one norm scale against Kingma & Ba's and Loshchilov & Hutter's formulas."""
    settings = cfg.Optimizer(learning_rate=0.1, schedule="constant", weight_decay=0.5, b1=0.8, b2=0.9, max_grad_norm=None)
    tx = opt.make(settings, 10)
    params = {"kernel": jnp.array([[2.0]]), "scale": jnp.array([3.0])}
    state, w, s, m, v = tx.init(params), 2.0, 3.0, 0.0, 0.0
    for k, g in enumerate((0.5, -0.25), 1):
        updates, state = tx.update(jax.tree.map(lambda x, g=g: jnp.full_like(x, g), params), state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        step = (m / (1 - 0.8**k)) / (np.sqrt(v / (1 - 0.9**k)) + 1e-8)
        w, s = w - 0.1 * (step + 0.5 * w), s - 0.1 * step
    np.testing.assert_allclose([params["kernel"][0, 0], params["scale"][0]], [w, s], rtol=1e-6)


def test_moments_are_stored_in_bfloat16_and_used_in_float32():
    settings = cfg.Optimizer(learning_rate=0.1, schedule="constant", moment_dtype="bfloat16")
    tx = opt.make(settings, 10)
    params = {"kernel": jnp.ones((4, 4))}
    grads = {"kernel": jax.random.normal(jax.random.key(0), (4, 4))}
    updates, state = tx.update(grads, tx.init(params), params)
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and set(floats) == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(updates["kernel"], -0.1 * np.sign(grads["kernel"]), rtol=1e-4)  # first Adam step
