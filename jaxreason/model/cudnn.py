"""cuDNN's fused attention on Hopper and newer: packed rows in training, a cache with lengths in decoding.

jax.nn's public function cannot pack (it takes padding lengths, not segments), so this binds JAX's private primitive.
It binds the inner one and writes the layout itself, for two reasons. The outer one scales the key offsets by the number
of *query* heads, so that with grouped heads every segment but the first reads other tokens' keys, silently (jax 0.10.2;
jax PR 39521 fixes it, in 0.12). And it leaves the softmax statistics unnamed, so that every remat
policy but "none" would run the forward twice. Whether the private function still has the shape that this file was
written for is checked by :func:`unavailable`; where it has not, attention falls back and says so.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxreason.model import placement
from jaxreason.types import MAX_SEGMENTS

_MAX_OFFSET = 2**31  # offsets are int32 elements
_assumed: float | None = None


@contextlib.contextmanager
def assume_capability(capability: float) -> Iterator[None]:
    """Inside, what is traced is meant for a GPU of this compute capability, which need not be here (9.0: Hopper)."""
    global _assumed
    before, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = before


def _capability() -> float:
    """Compute capability of this process's GPU; 0 without one."""
    if _assumed is not None:
        return _assumed
    return float(getattr(jax.devices()[0], "compute_capability", None) or 0)


def unavailable(dtype: DTypeLike, head_dim: int) -> str | None:
    """Why cuDNN's packed attention cannot be used here, or None if it can."""
    if _capability() < 9.0:
        return "it needs a Hopper GPU or newer (compute capability 9.0)"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"it computes in bfloat16 and model.compute_dtype is {jnp.dtype(dtype).name}"
    if head_dim > 128 or head_dim % 8:
        return f"it needs a head_dim that is a multiple of 8 up to 128, and the model's is {head_dim}"
    return _private_api_differs()


# ---- JAX's private primitive

_OPERANDS = ("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets",
             "page_table_k", "page_table_v")  # fmt: skip
_BACKWARD_OPERANDS = (*_OPERANDS, "activation", "fwd_output", "grad_output")
_SETTINGS = {
    "scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length", "is_training",
}  # fmt: skip
_UNUSED = {"score_mod_name": None, "score_mod_jaxpr": None}  # jax 0.12's flexible scores


def _private() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


@functools.cache
def _private_api_differs() -> str | None:
    try:
        fa = _private()
        lowerings = (fa._dot_product_attention_fwd_cuda_lowering, _OPERANDS, _SETTINGS), (
            fa._dot_product_attention_bwd_cuda_lowering, _BACKWARD_OPERANDS, _SETTINGS - {"is_training"},
        )  # fmt: skip
        _ = fa.MaskType.PADDING_CAUSAL, fa.AttentionLayout.BTNH, fa._dot_product_attention_fwd_p
        _ = fa.MaskType.PADDING, fa.AttentionLayout.BNTH, fa._dot_product_attention_bwd_p
        same = all(_parameters(function) - _UNUSED.keys() == {*names, *rest} for function, names, rest in lowerings)
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has moved its private cuDNN call ({error})"
    return None if same else f"jax {jax.__version__} has changed its private cuDNN call"


def _parameters(function: Callable) -> set[str]:
    found = inspect.signature(function).parameters.values()
    return {p.name for p in found if p.kind is not p.VAR_POSITIONAL} - {"ctx"}


def _settings(lowering: Callable, **values: Any) -> dict:
    """What the primitive is bound with: ``values``, and nothing for what only newer versions know."""
    plain = {"seed": 0, "dropout_rate": 0.0, "variadic_args": (False, False), "sliding_window_length": None}
    return plain | values | {name: None for name in _UNUSED.keys() & _parameters(lowering)}


# ---- packed rows


def packed_layout(segment_ids: Array, max_segments: int) -> tuple[Array, Array]:
    """Where segments begin and how long they are, as the kernel wants them.

    All segments of all rows are in one list, in order, because the kernel takes the rows as one buffer of B·T
    tokens: ``starts`` [B, M + 1] are token numbers in that buffer, then B·T where there is no segment; ``lengths``
    [B, M] are followed by 0. (JAX's outer function takes them by rows, −1 in unused places, and makes this.)
    A row's padding is one more segment, so that every output is written and finite.

    Args:
      segment_ids: [B, T], contiguous segments.
      max_segments: M, of which a row's padding takes one.
    """
    rows, length = segment_ids.shape
    first = jnp.ones((rows, 1), bool)
    begins = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1).reshape(-1)
    slots = rows * max_segments
    starts = jnp.nonzero(begins, size=slots + 1, fill_value=rows * length)[0].astype(jnp.int32)
    lengths = starts[1:] - starts[:-1]
    rest = jnp.full(rows - 1, rows * length, jnp.int32)
    return jnp.concatenate([starts, rest]).reshape(rows, max_segments + 1), lengths.reshape(rows, max_segments)


def segment_bound(needed: int) -> int:
    """The M to compile for where no row has more than ``needed`` segments: 4, 8, 16 or 32, so that programs stay few.

    The kernel's statistics, its workspace and its passes over B·M·T entries grow with M: at 8,192 tokens a row of a 3B
    model, 8 in place of 32 saved 5 GiB and 2.3 % of a step on an H100.
    """
    return next((bound for bound in (4, 8, 16) if needed <= bound), MAX_SEGMENTS)


def refuse_overfull(x: Array, segment_ids: Array, max_segments: int) -> Array:
    """``x`` [B, T, D], but NaN in rows of more than ``max_segments`` segments (padding counts as one).

    The kernel would leave the tokens of further segments unwritten. The packer makes no such rows; if something else
    does, the loss is NaN and the training loop stops there.
    """
    count = 1 + jnp.sum(segment_ids[:, 1:] != segment_ids[:, :-1], axis=1)
    return jnp.where((count <= max_segments)[:, None, None], x, jnp.nan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def packed(q: Array, k: Array, v: Array, segment_ids: Array, max_segments: int) -> Array:
    """Causal attention within segments. q [B, T, N, H], k and v [B, T, K, H], segment_ids [B, T]; like q."""
    return _packed_fwd(q, k, v, segment_ids, max_segments)[0]


def _packed_fwd(q: Array, k: Array, v: Array, segment_ids: Array, max_segments: int) -> tuple[Array, tuple[Array, ...]]:
    forward = functools.partial(_forward, max_segments=max_segments)
    out, lse = _per_device(forward, q.shape[0], k.shape[2], "rttt", "th")(segment_ids, q, k, v)
    # Named, so that a remat policy can keep exactly these and never run the forward a second time.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segment_ids, out, lse)


def _packed_bwd(max_segments: int, saved: tuple[Array, ...], grad: Array) -> tuple[Array | np.ndarray, ...]:
    q, k, v, segment_ids, out, lse = saved
    local = functools.partial(_backward, max_segments=max_segments)
    backward = _per_device(local, q.shape[0], k.shape[2], "rttttht", "ttt")
    return *backward(segment_ids, q, k, v, out, lse, grad), np.zeros(segment_ids.shape, jax.dtypes.float0)


packed.defvjp(_packed_fwd, _packed_bwd)


def _forward(segment_ids: Array, q: Array, k: Array, v: Array, max_segments: int) -> tuple[Array, Array]:
    """out [B, T, N, H] and the log-sum-exp [B·M, N, T] float32 of the rows and heads on one device."""
    fa = _private()
    out, lse = fa._dot_product_attention_fwd_p.bind(
        q, k, v, *_operands(segment_ids, q, k, max_segments), is_training=True,
        **_settings(fa._dot_product_attention_fwd_cuda_lowering, **_packed_settings(q)),
    )  # fmt: skip
    return out, lse


def _backward(
    segment_ids: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, grad: Array, max_segments: int
) -> tuple[Array, ...]:
    fa = _private()
    return tuple(
        fa._dot_product_attention_bwd_p.bind(
            q, k, v, *_operands(segment_ids, q, k, max_segments), lse, out, grad,
            **_settings(fa._dot_product_attention_bwd_cuda_lowering, **_packed_settings(q)),
        )
    )  # fmt: skip


def _packed_settings(q: Array) -> dict:
    fa = _private()
    mask, layout = fa.MaskType.PADDING_CAUSAL, fa.AttentionLayout.BTNH.value
    return {"scale": q.shape[-1] ** -0.5, "mask_type": mask, "layout": layout}


def _operands(segment_ids: Array, q: Array, k: Array, max_segments: int) -> tuple[Array, ...]:
    """The operands between value and activation: no bias, lengths, offsets in elements, no pages."""
    if q.size >= _MAX_OFFSET:
        raise ValueError(f"a microbatch of {q.shape[0]} rows is too large for int32 offsets; use fewer rows per device")
    starts, lengths = packed_layout(segment_ids, max_segments)
    none = jnp.zeros(0, q.dtype)
    return (
        none, lengths, lengths, starts * (q.shape[2] * q.shape[3]), starts * (k.shape[2] * k.shape[3]), none, none,
    )  # fmt: skip


def _per_device(function: Callable, rows: int, kv_heads: int, operands: str, results: str) -> Callable:
    """``function`` on each device's own rows and heads; the partitioner cannot look into a custom call.

    Operands and results are described by a letter each: ``r`` has rows first, ``h`` also heads second, ``t`` heads
    third.
    """
    row_axes, head_axis = placement.row_axes(rows), placement.head_axis(kv_heads)
    if row_axes is None and head_axis is None:
        return function
    spec = {"r": (row_axes,), "h": (row_axes, head_axis), "t": (row_axes, None, head_axis)}
    specs = [tuple(PartitionSpec(*spec[letter]) for letter in letters) for letters in (operands, results)]
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


# ---- decoding


def cached(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """Attention of one new token a sequence to the first ``lengths`` [B] entries of its cache.

    q [B, 1, N, H]; k, v [B, K, C, H]. The kernel reads those entries only, and the layout of the cache as it is.
    """
    lengths = lengths.astype(jnp.int32)
    (out,) = _per_device(_decode, q.shape[0], k.shape[1], "rthh", "t")(lengths, q, k, v)
    return out


def _decode(lengths: Array, q: Array, k: Array, v: Array) -> tuple[Array]:
    fa = _private()
    none = jnp.zeros(0, q.dtype)
    settings = _settings(
        fa._dot_product_attention_fwd_cuda_lowering, scale=q.shape[-1] ** -0.5, mask_type=fa.MaskType.PADDING,
        layout=fa.AttentionLayout.BNTH.value, is_training=False,
    )  # fmt: skip
    (out,) = fa._dot_product_attention_fwd_p.bind(
        q.swapaxes(1, 2), k, v, none, jnp.ones_like(lengths), lengths, none, none, none, none, **settings
    )
    return (out.swapaxes(1, 2),)
