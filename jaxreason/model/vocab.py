"""The vocabulary head: per-token log-prob, entropy, logsumexp and mean log-prob, never a [B, T, V] array.

Two ways, one formula. With logits z = hidden · headᵀ / temperature and p = softmax(z), for target y

    logp = z_y − lse,  lse = log Σ e^z,  entropy = lse − Σ p z,  mean_logp = mean_v z_v − lse

and the gradient of any scalar in them with cotangents (a, l, h, m) is

    dz_v = a·[v = y] + m/V − p_v · (a − l + m + h·(z_v − lse + entropy)).

:func:`token_loss` walks over chunks of tokens and forms the gradient in the forward pass, for losses that are sums over
tokens. :func:`head_stats` walks over chunks of the vocabulary (arXiv 2411.09009) and recomputes in the backward pass,
for losses that couple tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxreason.model.placement import SHARD_AXIS, row_axes, row_ways
from jaxreason.types import combine_metrics, empty_metrics

Value = tuple[Array, dict[str, Array]]  # of the loss, with its metrics
HALF_BUDGET = 2**30  # elements of the largest tile of bfloat16's logits: a row of 8,192 tokens of Llama-3.2's vocabulary
Walked = tuple[Any, Any, Any]  # a Value, and the gradients of hidden and head, which are None where they are not wanted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadStats:
    """All float32, of the targets' shape. Differentiable."""

    logp: Array
    entropy: Array
    logsumexp: Array
    mean_logp: Array


def logits_of(x: Array, head: Array, temperature: float) -> Array:
    """[n, D] · [v, D]ᵀ → [n, v] float32."""
    z = lax.dot_general(x, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return z if temperature == 1.0 else z / temperature


def dense_stats(z: Array, targets: Array) -> HeadStats:
    """Of logits [n, V] and targets [n]; differentiable."""
    top = lax.stop_gradient(z.max(-1))
    return _stats(z, targets, top, jnp.exp(z - top[:, None]).sum(-1))


def _stats(z: Array, targets: Array, top: Array, total: Array) -> HeadStats:
    """``total``: Σ e^(z − top) of every row, top [n] near its maximum."""
    lse = jnp.log(total) + top
    target = jnp.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
    weighted = (jnp.exp(z - top[:, None]) * z).sum(-1)
    return HeadStats(target - lse, lse - weighted / total, lse, z.mean(-1) - lse)


def _top_and_total(z: Array) -> tuple[Array, Array]:
    """The maximum of every row of z [n, V] and Σ e^(z − maximum), [n] each; not differentiable.

    A GPU, which needs for this no longer than the logits take to arrive, reads them once; a CPU, which does not vectorise a sum
    of pairs, reads them twice.
    """
    return lax.platform_dependent(z, cuda=online, default=two_passes)


def two_passes(z: Array) -> tuple[Array, Array]:
    """(maximum, Σ e^(z − maximum)) of every row, one after the other."""
    top = z.max(-1)
    return top, jnp.exp(z - top[:, None]).sum(-1)


def online(z: Array) -> tuple[Array, Array]:
    """:func:`two_passes` in one (arXiv 1805.02867): where a larger value comes, what was added up so far shrinks."""

    def both(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

    lowest = jnp.float32(jnp.finfo(jnp.float32).min)  # and not −inf, whose difference with itself is no number
    return lax.reduce((z, jnp.ones_like(z)), (lowest, jnp.float32(0)), both, (1,))


def _dz(z: Array, hit: Array, stats: HeadStats, grads: HeadStats, vocab: int, needs: frozenset) -> Array:
    """The gradient of the module's docstring; terms that no loss reads are left out."""
    coefficient = grads.logp
    if "logsumexp" in needs:
        coefficient = coefficient - grads.logsumexp
    if "mean_logp" in needs:
        coefficient = coefficient + grads.mean_logp
    coefficient = coefficient[:, None]
    if "entropy" in needs:
        coefficient = coefficient + grads.entropy[:, None] * (z - stats.logsumexp[:, None] + stats.entropy[:, None])
    dz = jnp.where(hit, grads.logp[:, None], 0.0) - jnp.exp(z - stats.logsumexp[:, None]) * coefficient
    return dz + grads.mean_logp[:, None] / vocab if "mean_logp" in needs else dz


def chunk_of(length: int, width: int, budget: int) -> tuple[int, int]:
    """(chunk, padding): the fewest equal chunks of ``length`` with chunk · width ≤ budget elements."""
    count = max(1, -(-length * width // budget))
    chunk = -(-length // count)
    if count > 1:
        chunk = -(-chunk // 8) * 8
        count = -(-length // chunk)
    return chunk, count * chunk - length


def token_loss(
    hidden: Array,
    head: Array,
    targets: Array,
    aux: dict,
    consts: Any,
    loss: Callable,
    needs: Collection[str] = frozenset(),
    budget: int | None = None,
) -> tuple[Array, dict]:
    """Value and metrics of a loss that is a sum over tokens; one pass over chunks of tokens.

    Args:
      hidden: [n, D] compute dtype.  head: [V, D] master dtype.  targets: [n] int32.
      aux: dict of [n] arrays.  consts: pytree that every chunk sees, such as the step's totals.
      loss: ``(HeadStats, aux, consts) -> (value, metrics)`` of a chunk; values and metrics add over chunks.
      needs: names of the stats beyond ``logp`` that the loss reads.
      budget: elements of the largest logits tile; None: ``HALF_BUDGET`` in bfloat16, else 2^27. Each chunk adds to a gradient of
        the table's size, so that on an H100 eight times the chunk saved 2 % of a 3B step for 2.9 GiB.
    """
    budget = budget or (HALF_BUDGET if hidden.dtype == jnp.bfloat16 else 2**27)
    return _token_loss(hidden, head, targets, aux, consts, loss, frozenset(needs), budget)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _token_loss(
    hidden: Array, head: Array, targets: Array, aux: dict, consts: Any, loss: Callable, needs: frozenset[str], budget: int
) -> Value:
    return _walk_by_device(hidden, head, targets, aux, consts, loss, needs, budget, with_grad=False)[0]


def _walk_by_device(
    hidden: Array,
    head: Array,
    targets: Array,
    aux: dict,
    consts: Any,
    loss: Callable,
    needs: frozenset[str],
    budget: int,
    with_grad: bool,
) -> Walked:
    """:func:`_token_walk` over each device's own tokens with the whole table, gathered once; dw is summed once.

    The partitioner would walk all devices through the same chunks and add up their logits.
    """
    axes = row_axes(hidden.shape[0])
    if axes is None:
        return _token_walk(hidden, head, targets, aux, consts, loss, needs, budget, with_grad)
    mesh = jax.sharding.get_abstract_mesh()
    scattered = with_grad and head.shape[1] % mesh.shape[SHARD_AXIS] == 0
    reduce = {"_max": lax.pmax, "_min": lax.pmin}

    def local(x: Array, table: Array, y: Array, a: dict, shared: Any) -> Walked:
        (value, metrics), dx, dw = _token_walk(x, table, y, a, shared, loss, needs, budget, with_grad)
        metrics = {name: reduce.get(name[-4:], lax.psum)(metric, axes) for name, metric in metrics.items()}
        if scattered:
            dw = lax.psum_scatter(dw, SHARD_AXIS, scatter_dimension=1, tiled=True)
            dw = lax.psum(dw, [axis for axis in axes if axis != SHARD_AXIS])
        elif with_grad:
            dw = lax.psum(dw, axes)
        return (lax.psum(value, axes), metrics), dx, dw

    rows, whole = PartitionSpec(axes), PartitionSpec()
    out = (whole, rows, PartitionSpec(None, SHARD_AXIS) if scattered else whole)
    into = (rows, whole, rows, rows, whole)
    walk = jax.shard_map(local, mesh=mesh, in_specs=into, out_specs=out, axis_names=set(axes), check_vma=False)
    return walk(hidden, head.astype(hidden.dtype), targets, aux, consts)


def _token_walk(
    hidden: Array,
    head: Array,
    targets: Array,
    aux: dict,
    consts: Any,
    loss: Callable,
    needs: frozenset[str],
    budget: int,
    with_grad: bool,
) -> Walked:
    chunk, pad = chunk_of(hidden.shape[0], head.shape[0], budget)
    table = head.astype(hidden.dtype)

    def one(x: Array, y: Array, a: dict) -> Walked:
        z = logits_of(x, table, 1.0)
        stats = _stats(z, y, *_top_and_total(z))
        if not with_grad:
            return loss(stats, a, consts), None, None
        value, pull, metrics = jax.vjp(lambda s: loss(s, a, consts), stats, has_aux=True)
        (grads,) = pull(jnp.ones_like(value))
        hit = lax.broadcasted_iota(jnp.int32, z.shape, 1) == y[:, None]
        dz = _dz(z, hit, stats, grads, head.shape[0], needs).astype(x.dtype)
        dw = lax.dot_general(dz, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (value, metrics), dz @ table, dw

    if chunk == hidden.shape[0]:
        return one(hidden, targets, aux)

    split = lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])  # noqa: E731
    pieces = jax.tree.map(split, (hidden, targets, aux))
    dw0 = jnp.zeros(head.shape, jnp.float32) if with_grad else None
    shapes = jax.eval_shape(lambda p: one(*jax.tree.map(lambda x: x[0], p))[0], pieces)
    start = jnp.zeros(shapes[0].shape, shapes[0].dtype), empty_metrics(shapes[1])

    def body(carry: tuple, piece: tuple) -> tuple[tuple, Array]:
        (value, metrics), dw = carry
        (v, m), dx, dw_piece = one(*piece)
        metrics = {k: combine_metrics(k, metrics[k], m[k]) for k in metrics}
        return ((value + v, metrics), dw + dw_piece if with_grad else None), dx

    (out, dw), dx = lax.scan(body, (start, dw0), pieces)
    if with_grad:
        dx = dx.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return out, dx, dw


def _token_fwd(
    hidden: Array, head: Array, targets: Array, aux: dict, consts: Any, loss: Callable, needs: frozenset[str], budget: int
) -> tuple[Value, tuple]:
    out, dx, dw = _walk_by_device(hidden, head, targets, aux, consts, loss, needs, budget, with_grad=True)
    return out, (dx, dw.astype(head.dtype), targets, aux, consts)


def _token_bwd(loss: Callable, needs: frozenset[str], budget: int, saved: tuple, cotangent: tuple) -> tuple:
    dx, dw, targets, aux, consts = saved
    g = cotangent[0]
    return (dx * g).astype(dx.dtype), (dw * g).astype(dw.dtype), _no_grad(targets), _no_grad(aux), _no_grad(consts)


_token_loss.defvjp(_token_fwd, _token_bwd)


def _no_grad(tree: Any) -> Any:
    def zero(x: Array) -> Array | np.ndarray:
        return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def head_stats(
    hidden: Array,
    head: Array,
    targets: Array,
    temperature: float = 1.0,
    needs: Collection[str] = frozenset({"entropy"}),
    budget: int = 2**26,
) -> HeadStats:
    """Statistics of the next-token distribution softmax(hidden · headᵀ / temperature) at every position.

    Args:
      hidden: [B, T, D] compute dtype.  head: [V, D] master dtype.  targets: [B, T] int32.
      temperature: the one that the tokens were sampled with, so that log-probs speak of the same distribution.
      needs: stats whose gradient is wanted in addition to ``logp``'s; the values are exact in any case.
      budget: elements of the largest logits tile of one device, B·T·chunk.

    Returns: HeadStats of [B, T] float32.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    stats = _head_stats(flat, head, targets.reshape(-1), float(temperature), frozenset(needs), budget)
    return jax.tree.map(lambda x: x.reshape(targets.shape), stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _head_stats(hidden: Array, head: Array, targets: Array, temperature: float, needs: frozenset[str], budget: int) -> HeadStats:
    return _vocab_walk(hidden, head, targets, temperature, budget)


def _vocab_pieces(head: Array, rows: int, dtype: DTypeLike, budget: int) -> tuple[Array, int]:
    """The table in chunks. The budget is of one device, which holds its share of the rows: fewer and larger gathers."""
    chunk, pad = chunk_of(head.shape[0], rows // row_ways(rows), budget)
    return jnp.pad(head.astype(dtype), ((0, pad), (0, 0))).reshape(-1, chunk, head.shape[1]), chunk


def _vocab_walk(hidden: Array, head: Array, targets: Array, temperature: float, budget: int) -> HeadStats:
    vocab = head.shape[0]
    pieces, chunk = _vocab_pieces(head, hidden.shape[0], hidden.dtype, budget)
    if chunk == vocab:
        return dense_stats(logits_of(hidden, pieces[0], temperature), targets)

    def body(carry: tuple[Array, ...], item: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        top, total, weighted, target, plain = carry
        i, piece = item
        z = logits_of(hidden, piece, temperature)
        column = i * chunk + jnp.arange(chunk)
        live = column < vocab
        new_top = jnp.maximum(top, jnp.where(live, z, -jnp.inf).max(-1))
        e, shrink = jnp.where(live, jnp.exp(z - new_top[:, None]), 0.0), jnp.exp(top - new_top)
        target = target + jnp.where(column == targets[:, None], z, 0.0).sum(-1)
        total, weighted = total * shrink + e.sum(-1), weighted * shrink + (e * z).sum(-1)
        return (new_top, total, weighted, target, plain + jnp.where(live, z, 0.0).sum(-1)), None

    zero = jnp.zeros(hidden.shape[0], jnp.float32)
    start: tuple[Array, ...] = (zero - jnp.inf, zero, zero, zero, zero)
    (top, total, weighted, target, plain), _ = lax.scan(body, start, (jnp.arange(len(pieces)), pieces))
    lse = jnp.log(total) + top
    return HeadStats(target - lse, lse - weighted / total, lse, plain / vocab - lse)


def _head_fwd(
    hidden: Array, head: Array, targets: Array, temperature: float, needs: frozenset[str], budget: int
) -> tuple[HeadStats, tuple]:
    stats = _vocab_walk(hidden, head, targets, temperature, budget)
    return stats, (hidden, head, targets, stats)


def _head_bwd(temperature: float, needs: frozenset[str], budget: int, saved: tuple, grads: HeadStats) -> tuple:
    hidden, head, targets, stats = saved
    vocab = head.shape[0]
    pieces, chunk = _vocab_pieces(head, hidden.shape[0], hidden.dtype, budget)

    def one(i: Array | int, piece: Array) -> tuple[Array, Array]:
        z = logits_of(hidden, piece, temperature)
        column = i * chunk + jnp.arange(chunk)
        dz = _dz(z, column == targets[:, None], stats, grads, vocab, needs) / temperature
        dz = jnp.where(column < vocab, dz, 0.0).astype(hidden.dtype)
        dx = lax.dot_general(dz, piece, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        dw = lax.dot_general(dz, hidden, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return dx, dw.astype(head.dtype)

    if chunk == vocab:
        dx, dw = one(0, pieces[0])
    else:

        def step(whole: Array, item: tuple[Array, Array]) -> tuple[Array, Array]:
            dx, dw = one(*item)
            return whole + dx, dw

        dx, dw = lax.scan(step, jnp.zeros(hidden.shape, jnp.float32), (jnp.arange(len(pieces)), pieces))
        dw = dw.reshape(-1, head.shape[1])[:vocab]
    return dx.astype(hidden.dtype), dw, np.zeros(targets.shape, jax.dtypes.float0)


_head_stats.defvjp(_head_fwd, _head_bwd)
