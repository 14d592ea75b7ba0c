"""The packed cuDNN call, whose numbers cannot run here: its layout as data, and its operands read by a twin kernel.

The twin takes what cuDNN is given (flat buffers, offsets in elements, lengths) and does with it what cuDNN documents.
It stands where the private primitive stands, so everything around the kernel is tested: offsets, grouped heads, several
rows, padding, shards, the named residuals, the backward pass.
"""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxreason import model
from jaxreason.errors import UserError
from jaxreason.model import cudnn
from jaxreason.model.attention import attention, cached_attention, resolve

T, N, K, H, M = 24, 4, 2, 8, 6


def segments(*rows: list[int]) -> np.ndarray:
    """Segment ids [B, T] from each row's segment lengths; a negative length is padding."""
    return np.asarray(
        [np.concatenate([np.full(abs(n), 0 if n < 0 else i, np.int32) for i, n in enumerate(row, 1)]) for row in rows]
    )


ROWS = segments([5, 12, 7], [24], [1, 1, 20, -2], [-24], [9, 3, 3, 3, -6], [23, 1], [12, 12], [2, 2, 2, 2, 2, 14])


def arrays(rows: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((rows, T, heads, H), np.float32) for heads in (N, K, K, N)]


# ---- the twin


def twin_packed(q, k, v, lengths, q_offsets, kv_offsets, scale):
    """Ragged attention over flat buffers. Tokens that no sequence covers stay NaN, as memory nobody wrote."""
    _, length, heads, size = q.shape
    sequences, position = lengths.size, jnp.arange(length)
    live = position < lengths.reshape(-1)[:, None]  # [S, T]

    def places(offsets, width):
        index = offsets.reshape(-1)[:sequences, None, None] + position[:, None] * width + jnp.arange(width)
        return jnp.where(live[..., None], index, q.size)

    def read(buffer, offsets):
        index = places(offsets, buffer.shape[2] * size)
        taken = buffer.reshape(-1).at[index].get(mode="fill", fill_value=0).reshape(sequences, length, -1, size)
        return jnp.repeat(taken, heads // buffer.shape[2], axis=2)

    scores = jnp.einsum("xtnh,xsnh->xnts", read(q, q_offsets), read(k, kv_offsets)) * scale
    seen = (position[:, None] >= position[None]) & live[:, None, None]
    scores = jnp.where(seen, scores, -1e30)
    result = jnp.einsum("xnts,xsnh->xtnh", jax.nn.softmax(scores, -1), read(v, kv_offsets))
    out = jnp.full(q.size, jnp.nan, q.dtype).at[places(q_offsets, heads * size)].set(
        result.reshape(sequences, length, -1).astype(q.dtype), mode="drop"
    )
    return out.reshape(q.shape), jax.nn.logsumexp(scores, axis=-1)


@jax.jit
def twin_forward(*operands):
    """A name to count in a program."""
    return twin_packed(*operands)


class Kernel:
    """Stands for both primitives, and counts."""

    def __init__(self):
        self.forwards = self.backwards = 0

    def forward(
        self, q, k, v, bias, q_len, kv_len, q_off, kv_off, page_k, page_v, *, is_training, scale, mask_type, layout, **_
    ):
        self.forwards += 1
        fa = cudnn.PRIVATE
        assert bias.size == page_k.size == page_v.size == 0
        if is_training:
            assert (mask_type, layout) == (fa.MaskType.PADDING_CAUSAL, fa.AttentionLayout.BTNH.value)
            return twin_forward(q, k, v, q_len, q_off, kv_off, scale)
        assert (mask_type, layout) == (fa.MaskType.PADDING, fa.AttentionLayout.BNTH.value)
        assert q_off.size == kv_off.size == 0 and q.shape[2] == 1
        seen = jnp.arange(k.shape[2]) < kv_len[:, None, None, None]
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        scores = jnp.where(seen, jnp.einsum("bnqh,bnch->bnqc", q, k) * scale, -jnp.inf)
        return (jnp.einsum("bnqc,bnch->bnqh", jax.nn.softmax(scores, -1), v),)

    def backward(self, q, k, v, bias, q_len, kv_len, q_off, kv_off, page_k, page_v, lse, out, grad, *, scale, **_):
        self.backwards += 1
        assert lse.shape == (q_len.size, q.shape[2], q.shape[1]) and out.shape == q.shape
        return jax.vjp(lambda *x: twin_packed(*x, q_len, q_off, kv_off, scale)[0], q, k, v)[1](grad)


@pytest.fixture
def kernel(monkeypatch):
    real, twin = cudnn._private(), Kernel()
    stub = types.SimpleNamespace(
        **{name: getattr(real, name) for name in ("MaskType", "AttentionLayout")},
        _dot_product_attention_fwd_cuda_lowering=real._dot_product_attention_fwd_cuda_lowering,
        _dot_product_attention_bwd_cuda_lowering=real._dot_product_attention_bwd_cuda_lowering,
        _dot_product_attention_fwd_p=types.SimpleNamespace(bind=twin.forward),
        _dot_product_attention_bwd_p=types.SimpleNamespace(bind=twin.backward),
    )
    monkeypatch.setattr(cudnn, "PRIVATE", real, raising=False)
    monkeypatch.setattr(cudnn, "_private", lambda: stub)
    return twin


# ---- the layout as data


def test_layout_by_hand():
    ids = segments([3, 21], [24], [-24])
    starts, lengths = cudnn.packed_layout(ids, 3)
    # one list of segments over the buffer of 72 tokens, then the end of the buffer where there is none
    assert starts.reshape(-1).tolist() == [0, 3, 24, 48, 72, 72, 72, 72, 72, 72, 72, 72]
    assert lengths.reshape(-1).tolist() == [3, 21, 24, 24, 0, 0, 0, 0, 0]
    assert (starts.shape, lengths.shape, starts.dtype, lengths.dtype) == ((3, 4), (3, 3), jnp.int32, jnp.int32)


def test_the_kernel_is_compiled_for_the_smallest_bound_that_holds_the_rows():
    assert [cudnn.segment_bound(n) for n in (1, 4, 5, 8, 9, 16, 17, 32)] == [4, 4, 8, 8, 16, 16, 32, 32]


def test_layout_allows_what_the_blockwise_mask_allows():
    starts, lengths = cudnn.packed_layout(ROWS, M)
    allowed = np.zeros((ROWS.size, ROWS.size), bool)
    for start, length in zip(np.asarray(starts).reshape(-1), np.asarray(lengths).reshape(-1)):
        allowed[start : start + length, start : start + length] = np.tril(np.ones((length, length), bool))
    row, position = np.divmod(np.arange(ROWS.size), T)
    ids = ROWS.reshape(-1)
    wanted = (row[:, None] == row) & (position[:, None] >= position) & (ids[:, None] == ids)
    np.testing.assert_array_equal(allowed, wanted)


def test_layout_is_what_jax_makes_of_its_documented_arrays():
    """Rows of starts and lengths, −1 where there is none, through JAX's own conversion; heads not grouped."""
    offsets, sizes = np.full((len(ROWS), M + 1), -1, np.int32), np.full((len(ROWS), M), -1, np.int32)
    for r, ids in enumerate(ROWS):
        begins = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
        offsets[r, : len(begins)], sizes[r, : len(begins)] = begins, np.diff(np.r_[begins, T])
    shape = np.zeros((len(ROWS), T, N, H), np.int8)
    theirs = cudnn._private()._fix_seqlen_offsets(*map(jnp.asarray, (sizes, sizes, offsets, offsets)), shape, shape)
    starts, lengths = cudnn.packed_layout(ROWS, M)
    np.testing.assert_array_equal(theirs[0], lengths)
    np.testing.assert_array_equal(theirs[2], starts * N * H)


def test_rows_with_too_many_segments_become_nan_and_others_do_not():
    x = jnp.ones((len(ROWS), T, 3))
    # row 4 has four segments and padding, the last row six segments
    refused = np.isnan(cudnn.refuse_overfull(x, ROWS, 4)).all(axis=(1, 2))
    assert refused.tolist() == [False] * 4 + [True] + [False] * 2 + [True]
    assert not np.isnan(cudnn.refuse_overfull(x, ROWS, M)).any()


# ---- the call, read by the twin


def value_and_grads(q, k, v, weight, ids, backend):
    def total(q, k, v):
        out = cudnn.packed(q, k, v, ids, M) if backend == "cudnn" else attention(q, k, v, ids, backend)
        return jnp.sum(out * weight), out

    (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return [out, *grads]


def test_call_equals_reference_in_values_and_gradients(kernel):
    inputs = arrays(len(ROWS))
    ours = jax.jit(value_and_grads, static_argnums=5)(*inputs, ROWS, "cudnn")
    wanted = jax.jit(value_and_grads, static_argnums=5)(*inputs, ROWS, "reference")
    for a, b in zip(ours, wanted):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    assert (kernel.forwards, kernel.backwards) == (1, 1)


def test_call_on_a_mesh_reads_each_devices_own_rows_and_heads(kernel):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    inputs = arrays(len(ROWS))
    wanted = jax.jit(value_and_grads, static_argnums=5)(*inputs, ROWS, "reference")
    with jax.set_mesh(mesh):
        ours = jax.jit(value_and_grads, static_argnums=5)(*inputs, ROWS, "cudnn")
    for a, b in zip(ours, wanted):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("remat", "forwards"), [("none", 1), ("attention", 1), ("matmuls", 1), ("full", 2)])
def test_a_policy_that_keeps_attention_never_runs_it_twice(kernel, remat, forwards):
    config = model.make_config(
        vocab_size=32, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=N, num_kv_heads=K, head_dim=H,
        compute_dtype="bfloat16", attention="cudnn", remat=remat, max_segments=M,
    )  # fmt: skip
    grad = jax.grad(lambda p: model.hidden(p, config, ROWS % 32, None, ROWS).astype(jnp.float32).sum())
    with cudnn.assume_capability(9.0):
        params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
        text = jax.jit(grad).lower(params).as_text()
    # One body serves all layers. Calls without q are the layout's share of the twin, taken out of the scan over layers.
    calls = re.findall(r"call @twin_forward.* : \(tensor<8x24x4x8xbf16>", text)
    assert len(calls) == forwards


def test_cached_call_reads_the_visible_prefix(kernel):
    q, k, v, _ = arrays(3)
    cache = [x.transpose(0, 2, 1, 3) for x in (k, v)]
    lengths = np.array([1, 24, 7])
    visible = np.arange(T) < lengths[:, None, None]
    wanted = cached_attention(q[:, :1], *cache, visible, "blockwise")
    np.testing.assert_allclose(cudnn.cached(q[:, :1], *cache, lengths), wanted, rtol=0, atol=1e-5)


# ---- where it is used


def test_auto_is_cudnn_on_hopper_in_bfloat16_only():
    assert resolve("auto", jnp.bfloat16, 128) == "blockwise"  # no GPU here
    with cudnn.assume_capability(9.0):
        assert resolve("auto", jnp.bfloat16, 128) == "cudnn"
        assert resolve("auto", jnp.bfloat16, 64) == "cudnn"
        assert resolve("auto", jnp.float32, 128) == "blockwise"
        assert resolve("auto", jnp.bfloat16, 256) == resolve("auto", jnp.bfloat16, 36) == "blockwise"
    with cudnn.assume_capability(8.0):
        assert resolve("auto", jnp.bfloat16, 128) == "blockwise"


def test_asking_for_cudnn_where_it_cannot_be_names_the_reason():
    with pytest.raises(UserError, match="Hopper"):
        resolve("cudnn", jnp.bfloat16, 128)
    with cudnn.assume_capability(9.0), pytest.raises(UserError, match="float32"):
        resolve("cudnn", jnp.float32, 128)


def test_a_changed_private_function_is_noticed(monkeypatch):
    real = cudnn._private()
    changed = types.SimpleNamespace(**vars(real))
    changed._dot_product_attention_fwd_cuda_lowering = lambda ctx, query, key, value, soft_cap: None
    monkeypatch.setattr(cudnn, "_private", lambda: changed)
    cudnn._private_api_differs.cache_clear()
    try:
        with cudnn.assume_capability(9.0):
            assert resolve("auto", jnp.bfloat16, 128) == "blockwise"
            with pytest.raises(UserError, match="changed its private cuDNN call"):
                resolve("cudnn", jnp.bfloat16, 128)
    finally:
        monkeypatch.undo()
        cudnn._private_api_differs.cache_clear()
    assert cudnn._private_api_differs() is None
