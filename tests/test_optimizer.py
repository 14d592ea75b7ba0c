"""What is stored in bfloat16 keeps its mean, moves as float32 does, and is drawn from seed, update and element alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxreason import config as cfg
from jaxreason import losses, model
from jaxreason.train import optimizer as opt
from jaxreason.train.step import make_train_step
from jaxreason.types import Batch, TrainState

CONFIG = model.make_config(
    vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.2,
    tie_embeddings=False, attention="reference",
)  # fmt: skip


def draws(value: float, count: int) -> np.ndarray:
    """``count`` stochastic roundings of one number, each from other words."""
    words = jax.random.bits(jax.random.key(7), (count, 2), jnp.uint32)
    return np.asarray(jax.vmap(lambda w: opt.stochastic_round(jnp.float32(value), w))(words)).astype(np.float64)


@pytest.mark.parametrize(
    ("value", "below", "above", "up"),
    [
        # bfloat16 has 7 stored bits of mantissa: neighbours of 1 … 2 are 2^-7 apart, of 0.25 … 0.5 they are 2^-9 apart.
        (1.0 + 2**-9, 1.0, 1.0 + 2**-7, 0.25),
        (-(1.0 + 3 * 2**-9), -(1.0 + 2**-7), -1.0, 0.25),
        (0.25 + 2**-10, 0.25, 0.25 + 2**-9, 0.5),
    ],
)
def test_rounding_has_the_right_mean(value, below, above, up):
    """The two neighbours only, and the upper one as often as it is near: within 4 standard errors of 20,000 draws."""
    found = draws(value, 20_000)
    assert set(found) == {below, above}
    error = (above - below) * np.sqrt(up * (1 - up) / len(found))
    assert abs(found.mean() - value) < 4 * error
    assert abs((found == above).mean() - up) < 4 * np.sqrt(up * (1 - up) / len(found))


def test_elements_of_a_leaf_are_rounded_independently():
    """One draw of 256 x 256 equal numbers: the mean, and no correlation along either axis or with the next draw."""
    words = jax.random.bits(jax.random.key(3), (2, 2), jnp.uint32)
    x = jnp.full((256, 256), 1.0 + 2**-8, jnp.float32)  # half way: up or down with 1/2 each
    one, two = (np.asarray(opt.stochastic_round(x, w), np.float64) > 1.0 for w in words)
    spread = 4 * 0.5 / np.sqrt(one.size)
    assert abs(one.mean() - 0.5) < spread
    for a, b in ((one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one, two)):
        assert abs((a == b).mean() - 0.5) < spread * 1.01


def test_what_bfloat16_holds_stays():
    exact = jnp.array([0.0, -0.0, 1.5, -3.0, 2.0**100, jnp.inf, -jnp.inf], jnp.float32)
    for w in jax.random.bits(jax.random.key(0), (20, 2), jnp.uint32):
        np.testing.assert_array_equal(opt.stochastic_round(exact, w).astype(jnp.float32), exact)
    nan = jnp.array([0x7FFFFFFF, 0xFFFFFFFF], jnp.uint32).view(jnp.float32)  # a carry would run through all of their bits
    assert jnp.isnan(opt.stochastic_round(nan, jnp.array([1, 2], jnp.uint32)).astype(jnp.float32)).all()


def steps_after_a_change(round_nearest: bool, monkeypatch) -> np.ndarray:
    """Adam's step for 1,024 weights whose gradient is 1 for 2,000 updates and then 4 for 5,000 (five times 1/(1 - b2))."""
    if round_nearest:
        monkeypatch.setattr(opt, "stochastic_round", lambda x, words: x.astype(jnp.bfloat16))
    settings = cfg.Optimizer(learning_rate=1.0, schedule="constant", max_grad_norm=None, moment_dtype="bfloat16")
    tx = opt.make(settings, 7000, seed=5)
    params = {"kernel": jnp.zeros(1024)}

    def one(state, k):
        grads = {"kernel": jnp.full(1024, jnp.where(k < 2000, 1.0, 4.0))}
        updates, state = tx.update(grads, state, params)
        return state, updates["kernel"]

    last = jax.jit(lambda s: jax.lax.scan(one, s, jnp.arange(7000)))(tx.init(params))[1][-1]
    return -np.asarray(last)


def test_a_second_moment_in_bfloat16_follows_a_change_of_scale(monkeypatch):
    """The right step is 4 / sqrt(16 - 15 · 0.999^5000) = 1.003; each weight's own step is within a few percent of it."""
    right = 4 / np.sqrt(16 - 15 * 0.999**5000)
    found = steps_after_a_change(False, monkeypatch)
    assert abs(found.mean() / right - 1) < 0.01 and found.std() < 0.05
    nearest = steps_after_a_change(True, monkeypatch)
    assert nearest.mean() / right > 1.5  # what this test is for: rounding to nearest leaves the moment where it was


def batch() -> Batch:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 17)), jnp.int32)
    ones = jnp.ones((8, 16), jnp.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], jnp.tile(jnp.arange(16), (8, 1)), ones, ones.astype(jnp.float32))


def fast(step, state):
    """The step compiled for ``state``, a CPU's costly passes left out: these tests compile more than they run."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(step).lower(state, batch()).compile(options)


def way(dtype: str, count: int = 40) -> np.ndarray:
    """What ``count`` updates at a learning rate of 1e-5 add to all parameters; they start alike for every dtype."""
    settings = cfg.Optimizer(learning_rate=1e-5, schedule="constant")
    config, tx = CONFIG.replace(param_dtype=dtype), opt.make(settings, count, seed=1)
    start = jax.jit(lambda key: model.init(CONFIG.replace(param_dtype="bfloat16"), key))(jax.random.key(1))
    flat = lambda tree: np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])  # noqa: E731
    began = flat(start)
    params = jax.tree.map(lambda x: x.astype(dtype), start)
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, jax.jit(tx.init)(params))
    step = fast(make_train_step(config, losses.get("nll"), tx, opt.schedule(settings, count), 1, seed=1), state)
    for _ in range(count):
        state, *_ = step(state, batch())
    return flat(state.params) - began


def test_parameters_in_bfloat16_move_as_in_float32(monkeypatch):
    """A weight of 0.2 has neighbours 2^-10 = 1e-3 away, and 40 updates go 4e-4: rounding to nearest goes nowhere."""
    wanted = way("float32")
    assert way("bfloat16") @ wanted / (wanted @ wanted) == pytest.approx(1.0, abs=0.1)
    monkeypatch.setattr(opt, "stochastic_round", lambda x, words: x.astype(jnp.bfloat16))
    assert way("bfloat16") @ wanted / (wanted @ wanted) < 0.5


def test_float32_parameters_are_those_of_optax():
    params = {"a": jnp.array([1.0, 2.0]), "b": {"scale": jnp.array(3.0)}}
    updates = jax.tree.map(lambda x: x * 1e-3, params)
    jax.tree.map(np.testing.assert_array_equal, opt.apply(params, updates, 3, 1), optax.apply_updates(params, updates))


def test_draws_are_of_seed_update_and_leaf_alone():
    params = {"a": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones((64, 64), jnp.bfloat16)}
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 2**-8, jnp.float32), params)
    first = opt.apply(params, updates, 3, seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, opt.apply(params, updates, 3, seed=1))
    others = [opt.apply(params, updates, 4, seed=1)["a"], opt.apply(params, updates, 3, seed=2)["a"], first["b"]]
    for other in others:  # half of the elements differ by chance
        assert 0.4 < float((other != first["a"]).mean()) < 0.6


def test_rounding_is_the_same_on_eight_devices_and_on_one():
    """Moments and parameters of two updates, the leaf cut over both axes of a mesh of 4 x 2 and whole on one device."""
    settings = cfg.Optimizer(learning_rate=1e-3, schedule="constant", moment_dtype="bfloat16")
    tx = opt.make(settings, 2, seed=9)
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 64, 32)).astype(jnp.bfloat16)}
    grads = {"kernel": jax.random.normal(jax.random.key(1), (3, 64, 32))}

    @jax.jit
    def update(params, state, grads, step):
        updates, state = tx.update(grads, state, params)
        return opt.apply(params, updates, step, 9), state

    def run(place):
        p, s, g = place(params), jax.tree.map(lambda x: place(x) if x.ndim == 3 else x, tx.init(params)), place(grads)
        for step in range(2):
            p, s = update(p, s, g, step)
        return jax.tree.map(np.asarray, (p, s))

    mesh = jax.make_mesh((4, 2), ("a", "b"))
    cut = NamedSharding(mesh, PartitionSpec(None, "a", "b"))
    whole, parts = run(lambda x: x), run(lambda x: jax.device_put(x, cut))
    assert len(jax.device_put(params, cut)["kernel"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_a_run_interrupted_after_an_update_goes_on_bitwise():
    """State through the host and back after two of four updates, as a checkpoint does it."""
    settings = cfg.Optimizer(learning_rate=1e-3, schedule="constant", moment_dtype="bfloat16")
    half, tx = CONFIG.replace(param_dtype="bfloat16"), opt.make(settings, 4, seed=2)
    params = jax.jit(lambda key: model.init(half, key))(jax.random.key(1))
    states = [TrainState(jnp.zeros((), jnp.int32), params, {}, jax.jit(tx.init)(params))]
    step = fast(make_train_step(half, losses.get("nll"), tx, opt.schedule(settings, 4), 1, seed=2), states[0])
    for _ in range(4):
        states.append(step(states[-1], batch())[0])
    resumed = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), states[2])
    for _ in range(2):
        resumed, *_ = step(resumed, batch())
    jax.tree.map(np.testing.assert_array_equal, resumed, states[4])


def test_the_linear_schedule_ends_at_its_fraction():
    """1 - (k / 4)(1 - 0.2) for k = 0 … 3, and 0.2 after the last update."""
    at = opt.schedule(cfg.Optimizer(learning_rate=1.0, schedule="linear", final_fraction=0.2), 4)
    np.testing.assert_allclose([at(k) for k in range(5)], [1.0, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_weight_decay_reaches_every_matrix_and_no_norm():
    """With zero gradients the update is -rate · decay · w = -0.05 w for matrices, embedding and head too, and 0 for norms."""
    settings = cfg.Optimizer(learning_rate=0.1, schedule="constant", weight_decay=0.5)
    tx = opt.make(settings, 1)
    shapes = jax.eval_shape(lambda: model.init(CONFIG.replace(attention_bias=True), jax.random.key(0)))
    params = jax.tree.map(lambda x: np.linspace(1, 2, x.size, dtype=np.float32).reshape(x.shape), shapes)
    updates = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])(params)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    exempt = 0
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        free = name.endswith(("['scale']", "['bias']"))
        exempt += free
        np.testing.assert_allclose(update, 0.0 if free else -0.05 * named[name], rtol=1e-6, err_msg=name)
    assert {"['embedding']", "['head']"} <= {n for n in named} and exempt == 7  # four biases and three norms
