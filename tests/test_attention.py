"""Attention against a loop in numpy, blockwise against reference, isolation of packed neighbours, memory in T."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.model.attention import attention, cached_attention

BACKENDS = ["reference", "blockwise"]
B, N, K, H = 2, 4, 2, 8


def arrays(t: int, seed: int = 0, b: int = B):
    """q, k, v and a weight for the output; large enough that the softmax is far from uniform."""
    rng = np.random.default_rng(seed)
    return [2 * rng.standard_normal((b, t, heads, H), np.float32) for heads in (N, K, K, N)]


def segments(*rows: list[int]) -> np.ndarray:
    """Segment ids [B, T] from each row's segment lengths; a negative length is padding."""
    return np.asarray(
        [np.concatenate([np.full(abs(n), 0 if n < 0 else i, np.int32) for i, n in enumerate(row, 1)]) for row in rows]
    )


def looped(q, k, v, segment_ids):
    """The definition, one query at a time, in float64."""
    q, k, v, ids = (np.asarray(x, np.float64) for x in (q, k, v, segment_ids))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = [s for s in range(t + 1) if ids[b, s] == ids[b, t]]
        scores = k[b, keys, n // (N // K)] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, keys, n // (N // K)] / weights.sum()
    return out


@functools.partial(jax.jit, static_argnums=5)
def value_and_grads(q, k, v, weight, segment_ids, backend):
    """Output, and gradients of its weighted sum over real tokens."""

    def total(q, k, v):
        out = attention(q, k, v, segment_ids, backend)
        return jnp.sum(out * weight * (segment_ids > 0)[..., None, None]), out

    (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, grads


forward = jax.jit(attention, static_argnums=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_definition(backend):
    q, k, v, _ = arrays(40)
    ids = segments([1, 13, 20, -6], [40])
    np.testing.assert_allclose(forward(q, k, v, ids, backend), looped(q, k, v, ids), rtol=0, atol=1e-5)


def test_two_tokens_by_hand():
    q = jnp.full((1, 2, 1, 2), jnp.log(3.0) / jnp.sqrt(2.0))  # score = log 3 · mean(k · [1, 1]) over H = 2
    k = jnp.asarray([[[[0.0, 0.0]], [[1.0, 1.0]]]])
    v = jnp.asarray([[[[4.0, 0.0]], [[0.0, 8.0]]]])
    for backend in BACKENDS:
        out = forward(q, k, v, jnp.ones((1, 2), jnp.int32), backend)
        # token 1 scores (0, log 3): weights 1/4 and 3/4
        np.testing.assert_allclose(out[0, :, 0], [[4.0, 0.0], [1.0, 6.0]], rtol=1e-6)


# Blocks are 512 long: no length here is a multiple, boundaries lie inside blocks and on their edges, and the last
# segments begin in a later block. One length per number of blocks, since compiling is what takes time.
TWO_BLOCKS = segments([130, 470, 80, -20], [600, 100])
THREE_BLOCKS = segments([600, 424, 226], [511, 2, 700, -37])


@pytest.mark.parametrize("ids", [TWO_BLOCKS, THREE_BLOCKS])
def test_blockwise_equals_reference_in_values_and_gradients(ids):
    inputs = arrays(ids.shape[1])
    real = np.asarray(ids > 0)[..., None, None]
    out, grads = value_and_grads(*inputs, ids, "reference")
    out_b, grads_b = value_and_grads(*inputs, ids, "blockwise")
    np.testing.assert_allclose(out_b * real, out * real, rtol=0, atol=1e-5)
    for ours, wanted in zip(grads_b, grads):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ids", [TWO_BLOCKS, THREE_BLOCKS])
def test_a_segment_is_bitwise_blind_to_its_neighbours(backend, ids):
    t = ids.shape[1]
    q, k, v, weight = arrays(t)
    out, grads = value_and_grads(q, k, v, weight, ids, backend)
    other = arrays(t, seed=1)
    for segment in range(1, int(ids.max()) + 1):
        keep = np.asarray(ids == segment)
        mixed = [np.where(keep[..., None, None], x, 50 * y) for x, y in zip((q, k, v, weight), other)]
        new_out, new_grads = value_and_grads(*mixed, ids, backend)
        np.testing.assert_array_equal(np.asarray(new_out)[keep], np.asarray(out)[keep])
        for new, old in zip(new_grads, grads):
            np.testing.assert_array_equal(np.asarray(new)[keep], np.asarray(old)[keep])
        assert np.any(np.asarray(new_out)[~keep] != np.asarray(out)[~keep])  # the poison did reach the others


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_alone(backend):
    """Each segment of row 0, moved to the start of a row of its own, has the same outputs and gradients."""
    inputs = arrays(700)
    packed = value_and_grads(*inputs, TWO_BLOCKS, backend)
    for start, n in ((0, 130), (130, 470), (600, 80)):
        moved = [np.roll(x, -start, axis=1) for x in inputs]
        alone = value_and_grads(*moved, segments([n, n - 700], [700]), backend)
        for ours, wanted in zip(jax.tree.leaves(packed), jax.tree.leaves(alone)):
            wanted = np.asarray(wanted)[0, :n]
            np.testing.assert_allclose(ours[0, start : start + n], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_has_finite_gradients(backend):
    ids = segments([-700], [30, -670])
    out, grads = value_and_grads(*arrays(700), ids, backend)
    for x in (out, *grads):
        assert np.isfinite(x).all()
    for grad in grads:
        assert not np.any(np.asarray(grad)[np.asarray(ids == 0)])


def test_blockwise_memory_is_linear_in_length():
    def temporary_bytes(t, backend):
        q, k, v = (jax.ShapeDtypeStruct((1, t, heads, H), jnp.float32) for heads in (N, K, K))
        ids = jax.ShapeDtypeStruct((1, t), jnp.int32)
        grad = jax.grad(lambda q, k, v, ids: attention(q, k, v, ids, backend).sum(), argnums=(0, 1, 2))
        return jax.jit(grad).lower(q, k, v, ids).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048, "blockwise"), temporary_bytes(4096, "blockwise")
    assert long < 2.6 * short
    assert long < 4 * 4096 * 4096  # not even one float32 [T, T]
    assert temporary_bytes(4096, "reference") > 4 * 4096 * 4096 * N  # the measure does see such a buffer


def test_bfloat16_output_and_float32_softmax():
    q, k, v, _ = arrays(600)
    ids = segments([250, 350], [600])
    exact = forward(q, k, v, ids, "reference")
    for backend in BACKENDS:
        out = forward(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), ids, backend)
        assert out.dtype == jnp.bfloat16
        # inputs rounded to 8 bits: a bfloat16 softmax over 600 keys would be far worse than this
        assert float(jnp.abs(out.astype(jnp.float32) - exact).mean()) < 0.02


def test_cached_equals_the_last_rows():
    q, k, v, _ = arrays(24)
    whole = forward(q, k, v, jnp.ones((B, 24), jnp.int32), "reference")
    cache = [np.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, 8), (0, 0)), constant_values=9.0) for x in (k, v)]
    visible = jnp.arange(32)[None, None] <= jnp.arange(20, 24)[None, :, None]
    out = jax.jit(cached_attention)(q[:, 20:], *cache, jnp.broadcast_to(visible, (B, 4, 32)))
    np.testing.assert_allclose(out, whole[:, 20:], rtol=0, atol=1e-5)


def test_unknown_backend_is_named():
    q, k, v, _ = arrays(4)
    with pytest.raises(ValueError, match="flash3"):
        attention(q, k, v, jnp.ones((B, 4), jnp.int32), "flash3")
