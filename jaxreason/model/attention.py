"""Causal attention within segments, for packed rows: one function, several backends, and its cached form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxreason.errors import UserError
from jaxreason.model import cudnn
from jaxreason.model.product import times_transposed
from jaxreason.types import MAX_SEGMENTS

Index = Array | int  # of a block
_MASKED = -1e30  # finite, so that a fully masked row has no NaN; exp of it is 0 compared with any real score


def resolve(backend: str, dtype: DTypeLike, head_dim: int) -> str:
    """The backend that ``auto`` means here: cudnn where it can be used, else blockwise. Raises UserError for cudnn."""
    if backend not in ("auto", "cudnn", "blockwise", "reference"):
        raise ValueError(f"attention backend {backend!r} is not one of auto, cudnn, blockwise, reference")
    if backend not in ("auto", "cudnn"):
        return backend
    reason = cudnn.unavailable(dtype, head_dim)
    if reason is None:
        return "cudnn"
    if backend == "cudnn":
        raise UserError(f"model.attention is cudnn: {reason}; use auto or blockwise")
    return "blockwise"


def attention(
    q: Array, k: Array, v: Array, segment_ids: Array, backend: str = "auto", max_segments: int = MAX_SEGMENTS
) -> Array:
    """softmax(q kᵀ / √H) v over earlier positions of the same segment.

    Args:
      q: [B, T, N, H].  k, v: [B, T, K, H]; kv head j serves query heads j·N/K … (j+1)·N/K − 1.
      segment_ids: [B, T] int32, contiguous segments; 0 is padding (attended only by padding).
      backend: ``blockwise`` (memory linear in T), ``reference`` (the plain formula), ``cudnn``, or ``auto``.
      max_segments: at most this many in a row, padding included; only cudnn is compiled for a number.

    Returns: [B, T, N, H] in q's dtype. Scores and softmax are float32.
    """
    backend = resolve(backend, q.dtype, q.shape[-1])
    if backend == "reference":
        return _reference(q, k, v, segment_ids)
    if backend == "cudnn":
        return cudnn.packed(q, k, v, segment_ids, max_segments)
    return _blockwise(q, k, v, segment_ids)


def cached_attention(q: Array, k: Array, v: Array, visible: Array, backend: str = "auto") -> Array:
    """Attention of S new positions over a cache: q [B, S, N, H]; k, v [B, K, C, H]; visible [B, S, C] bool.

    For S = 1 what is visible is a prefix of the cache, which lets cudnn read no more than that.
    """
    b, s, n, h = q.shape
    if s == 1 and resolve(backend, q.dtype, h) == "cudnn":
        return cudnn.cached(q, k, v, jnp.sum(visible[:, 0], axis=-1))
    kv_heads = k.shape[1]
    grouped = q.reshape(b, s, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)
    scores = times_transposed(grouped, k, jnp.float32) * h**-0.5
    scores = scores.reshape(b, kv_heads, n // kv_heads, s, -1)
    scores = jnp.where(visible[:, None, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(b, kv_heads, (n // kv_heads) * s, -1)
    out = jnp.einsum("bkqc,bkch->bkqh", weights, v)
    return out.reshape(b, kv_heads, n // kv_heads, s, h).transpose(0, 3, 1, 2, 4).reshape(b, s, n, h)


def _reference(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    _, t, n, h = q.shape
    repeat = n // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * h**-0.5
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = same & jnp.tril(jnp.ones((t, t), bool))
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, _MASKED), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


# blockwise: online softmax over key blocks (arXiv 2205.14135), saving only (q, k, v, out, lse). Inside, query heads
# that share a kv head are folded into the rows of one matmul, [B, K, (N/K)·block, H]: fewer and larger products.


_TILE = 2**19  # elements of the score tile: 2 MiB, so that it stays in a CPU core's cache between its uses


def _block_size(rows: int, heads: int, length: int) -> int:
    """Power of two from 32 to 512 whose tile [B, N, block, block] fits; measured 2.6 times as fast as one 256 block."""
    block = 512
    while block > 32 and (rows * heads * block * block > _TILE or block >= 2 * length):
        block //= 2
    return block


def _blockwise(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    b, t, n, h = q.shape
    kv_heads, block = k.shape[2], _block_size(b, n, t)
    pad = -t % block
    if pad:
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    q = q.reshape(b, t + pad, kv_heads, n // kv_heads, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, T, H]
    out = _flash(q, k, v, segment_ids, block)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t + pad, n, h)[:, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: Array, k: Array, v: Array, segment_ids: Array, block: int) -> Array:
    return _flash_forward(q, k, v, segment_ids, block)[0]


def _flash_fwd_rule(q: Array, k: Array, v: Array, segment_ids: Array, block: int) -> tuple[Array, tuple[Array, ...]]:
    out, lse = _flash_forward(q, k, v, segment_ids, block)
    # Named, so that a remat policy can keep exactly these and never run the forward a second time.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segment_ids, out, lse)


def _first_blocks(segment_ids: Array, block: int) -> Array:
    """First key block that any row's query block can see, [blocks] int32: earlier ones are other segments."""
    b, t = segment_ids.shape
    index = jnp.arange(t)
    new = jnp.concatenate([jnp.ones((b, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    starts = lax.cummax(jnp.where(new, index, 0), axis=1)
    return jnp.min(starts[:, ::block], axis=0) // block


def _take(x: Array, i: Index, block: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _scores(q_block: Array, k_block: Array, mask: Array) -> Array:
    """Masked scaled scores [B, K, G, q, s] float32 of q [B, K, G, q, H] and k [B, K, s, H]; mask [B, q, s]."""
    b, kv, g, rows, h = q_block.shape
    flat = jnp.einsum(
        "bkrh,bksh->bkrs", q_block.reshape(b, kv, g * rows, h), k_block, preferred_element_type=jnp.float32
    )
    return jnp.where(mask[:, None, None], flat.reshape(b, kv, g, rows, -1) * h**-0.5, _MASKED)


def _mask(segment_ids: Array, i: Index, j: Index, block: int) -> Array:
    query, key = _take(segment_ids, i, block, 1), _take(segment_ids, j, block, 1)
    causal = (i * block + jnp.arange(block))[:, None] >= (j * block + jnp.arange(block))[None]
    return (query[:, :, None] == key[:, None, :]) & causal


def _rows_times(weights: Array, x: Array) -> Array:
    """[B, K, G, r, s] · [B, K, s, H] → [B, K, G, r, H] float32."""
    b, kv, g, rows, s = weights.shape
    out = jnp.einsum(
        "bkrs,bksh->bkrh", weights.reshape(b, kv, g * rows, s).astype(x.dtype), x, preferred_element_type=jnp.float32
    )
    return out.reshape(b, kv, g, rows, -1)


def _columns_times(x: Array, weights: Array) -> Array:
    """x [B, K, H, G, r] · [B, K, G, r, s] → [B, K, H, s] float32, summed over the query heads of the kv head."""
    b, kv, g, rows, s = weights.shape
    return jnp.einsum(
        "bkhr,bkrs->bkhs", x.reshape(b, kv, -1, g * rows), weights.reshape(b, kv, g * rows, s).astype(x.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _flash_forward(q: Array, k: Array, v: Array, segment_ids: Array, block: int) -> tuple[Array, Array]:
    b, kv, g, t, h = q.shape
    blocks, first = t // block, _first_blocks(segment_ids, block)

    def query_block(i: Index) -> tuple[Array, Array]:
        q_block = _take(q, i, block, 3)

        def key_block(j: Index, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            top, total, acc = carry
            s = _scores(q_block, _take(k, j, block, 2), _mask(segment_ids, i, j, block))
            new_top = jnp.maximum(top, s.max(-1))
            p, shrink = jnp.exp(s - new_top[..., None]), jnp.exp(top - new_top)
            acc = acc * shrink[..., None] + _rows_times(p, _take(v, j, block, 2))
            return new_top, total * shrink + p.sum(-1), acc

        shape = (b, kv, g, block)
        init = jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, h))
        if blocks == 1:
            top, total, acc = key_block(0, init)
        else:
            top, total, acc = lax.fori_loop(first[i], i + 1, key_block, init)
        return (acc / total[..., None]).astype(q.dtype), top + jnp.log(total)

    if blocks == 1:
        return query_block(0)
    out, lse = lax.map(query_block, jnp.arange(blocks))  # [blocks, B, K, G, block, …]
    return jnp.moveaxis(out, 0, 3).reshape(q.shape), jnp.moveaxis(lse, 0, 3).reshape(q.shape[:-1])


def _flash_bwd_rule(block: int, saved: tuple[Array, ...], grad: Array) -> tuple[Array | np.ndarray, ...]:
    q, k, v, segment_ids, out, lse = saved
    b, kv, g, t, h = q.shape
    blocks, first, scale = t // block, _first_blocks(segment_ids, block), h**-0.5
    # [B, K, H, G, T], made once: a CPU takes 1.8 times as long for a product whose left side it has to turn in every tile.
    q_t, grad_t = lax.optimization_barrier((q.transpose(0, 1, 4, 2, 3), grad.transpose(0, 1, 4, 2, 3)))
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def pair(i: Index, j: Index) -> tuple[Array, ...]:
        """p and ds of one tile, and the blocks that they multiply: of q and the gradient, turned, and of k."""
        q_i, g_i = _take(q, i, block, 3), _take(grad, i, block, 3)
        k_j, v_j = _take(k, j, block, 2), _take(v, j, block, 2)
        p = jnp.exp(_scores(q_i, k_j, _mask(segment_ids, i, j, block)) - _take(lse, i, block, 3)[..., None])
        dp = jnp.einsum(
            "bkrh,bksh->bkrs", g_i.reshape(b, kv, g * block, h), v_j, preferred_element_type=jnp.float32
        ).reshape(p.shape)
        ds = p * (dp - _take(delta, i, block, 3)[..., None]) * scale
        return p, ds, _take(q_t, i, block, 4), _take(grad_t, i, block, 4), k_j

    if blocks == 1:
        p, ds, *_ = pair(0, 0)
        dq, dk, dv = _rows_times(ds, k), _columns_times(q_t, ds), _columns_times(grad_t, p)
    else:

        def query_block(carry: tuple[Array, Array], i: Index) -> tuple[tuple[Array, Array], Array]:
            def key_block(j: Index, inner: tuple[Array, ...]) -> tuple[Array, ...]:
                dq, dk, dv = inner
                p, ds, q_i, g_i, k_j = pair(i, j)
                dk = lax.dynamic_update_slice_in_dim(dk, _take(dk, j, block, 3) + _columns_times(q_i, ds), j * block, 3)
                dv = lax.dynamic_update_slice_in_dim(dv, _take(dv, j, block, 3) + _columns_times(g_i, p), j * block, 3)
                return dq + _rows_times(ds, k_j), dk, dv

            dq, dk, dv = lax.fori_loop(first[i], i + 1, key_block, (jnp.zeros((b, kv, g, block, h)), *carry))
            return (dk, dv), dq.astype(q.dtype)

        zeros = jnp.zeros((b, kv, h, t), jnp.float32)
        (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(blocks))
        dq = jnp.moveaxis(dq, 0, 3).reshape(q.shape)
    dk, dv = lax.optimization_barrier((dk, dv))  # or the simplifier turns a single tile's products around
    no_grad = np.zeros(segment_ids.shape, jax.dtypes.float0)
    return dq.astype(q.dtype), dk.mT.astype(k.dtype), dv.mT.astype(v.dtype), no_grad


_flash.defvjp(_flash_fwd_rule, _flash_bwd_rule)
