"""The head against the plain formula on full logits: values, gradients, chunks, temperature, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.model import vocab

N, D, V = 37, 16, 101  # no chunk divides these
ALL = frozenset({"entropy", "logsumexp", "mean_logp"})


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (N, D)) * 2,
        jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (N,), 0, V),
        jax.random.normal(keys[3], (4, N)),
    )


def plain_stats(x, w, y, temperature):
    log_p = jax.nn.log_softmax(x @ w.T / temperature)
    logp = jnp.take_along_axis(log_p, y[:, None], 1)[:, 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return vocab.HeadStats(logp, entropy, jax.nn.logsumexp(x @ w.T / temperature, -1), log_p.mean(-1))


def weigh(stats, c):
    return (c[0] * stats.logp + c[1] * stats.entropy + c[2] * stats.logsumexp + c[3] * stats.mean_logp).sum()


@pytest.mark.parametrize("budget", [2**20, N * 10, N * 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_head_stats_match_full_logits(arrays, budget, temperature):
    x, w, y, c = arrays

    def ours(x, w):
        stats = vocab.head_stats(x[None], w, y[None], temperature, ALL, budget)
        return weigh(jax.tree.map(lambda a: a[0], stats), c)

    value, grads = jax.value_and_grad(ours, (0, 1))(x, w)
    twin, twin_grads = jax.value_and_grad(lambda x, w: weigh(plain_stats(x, w, y, temperature), c), (0, 1))(x, w)
    np.testing.assert_allclose(value, twin, rtol=1e-5)
    for a, b in zip(grads, twin_grads):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_pass_over_logits_finds_what_two_find():
    """Rows that rise, fall, are level, huge or impossible in places; a twin in float64."""
    z = np.random.default_rng(0).normal(size=(7, 1000)).astype(np.float32) * 30
    z[1], z[2], z[3] = np.sort(z[1]), np.sort(z[2])[::-1], 4.0
    z[4], z[5, ::3], z[6, 1:] = z[4] * 1e30, -np.inf, -np.inf
    top, total = jax.jit(vocab.online)(z)
    np.testing.assert_array_equal(top, z.max(-1))
    np.testing.assert_allclose(total, np.exp(z.astype(np.float64) - z.max(-1, keepdims=True)).sum(-1), rtol=2e-6)
    assert total[3] == 1000 and total[6] == 1


@pytest.mark.parametrize("budget", [2**20, V * 8, V * 16])
def test_token_loss_matches_full_logits_for_a_nonlinear_loss(arrays, budget):
    x, w, y, c = arrays

    def loss(stats, aux, scale):
        value = (aux["c"] * jnp.sin(stats.logp) + stats.entropy**2 + stats.logsumexp * stats.mean_logp) * aux["m"]
        return value.sum() / scale, {"logp": (stats.logp * aux["m"]).sum(), "logp_max": stats.logp.max()}

    aux = {"c": c[0], "m": (jnp.arange(N) % 3 > 0).astype(jnp.float32)}
    ours = lambda x, w: vocab.token_loss(x, w, y, aux, jnp.float32(7.0), loss, ALL, budget)  # noqa: E731
    twin = lambda x, w: loss(plain_stats(x, w, y, 1.0), aux, 7.0)  # noqa: E731
    (value, metrics), grads = jax.value_and_grad(lambda *a: ours(*a), (0, 1), has_aux=True)(x, w)
    (twin_value, twin_metrics), twin_grads = jax.value_and_grad(lambda *a: twin(*a), (0, 1), has_aux=True)(x, w)
    np.testing.assert_allclose(value, twin_value, rtol=1e-5)
    np.testing.assert_allclose(metrics["logp"], twin_metrics["logp"], rtol=1e-5)
    if budget == 2**20:  # a padded last chunk adds rows of zeros, whose log-prob is that of a uniform distribution
        np.testing.assert_allclose(metrics["logp_max"], twin_metrics["logp_max"], rtol=1e-5)
    for a, b in zip(grads, twin_grads):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    without_grad, _ = ours(x, w)
    np.testing.assert_allclose(without_grad, twin_value, rtol=1e-5)


def test_uniform_logits_by_hand():
    stats = vocab.head_stats(jnp.zeros((1, 2, 4)), jnp.ones((8, 4)), jnp.zeros((1, 2), jnp.int32))
    for name, value in {"logp": -np.log(8), "entropy": np.log(8), "logsumexp": np.log(8), "mean_logp": -np.log(8)}.items():
        np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-6)


def test_no_array_of_tokens_by_vocabulary():
    n, d, v = 4096, 64, 16384
    x, w, y = (jax.ShapeDtypeStruct(s, t) for s, t in (((1, n, d), "float32"), ((v, d), "float32"), ((1, n), "int32")))
    full = n * v * 4

    def policy(x, w, y):
        return vocab.head_stats(x, w, y, budget=2**21).logp.sum()

    def sft(x, w, y):
        nll = lambda s, a, c: (-s.logp.sum(), {})  # noqa: E731
        return vocab.token_loss(x[0], w, y[0], {}, (), nll, budget=2**21)[0]

    for f in (policy, sft):
        temp = jax.jit(jax.grad(f, (0, 1))).lower(x, w, y).compile().memory_analysis().temp_size_in_bytes
        assert temp < full / 4, (f.__name__, temp, full)
