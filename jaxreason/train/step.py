"""The one step: (state, batch) -> (state, metrics), for SFT and GRPO alike."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxreason.losses import Loss, PolicyInputs, SftInputs, distill
from jaxreason.losses.segments import sequences_of
from jaxreason.losses.sft import neftune_noise
from jaxreason.model import LlamaConfig, add_gradients, cast_layers, head_kernel, hidden
from jaxreason.model.chunked import from_logits
from jaxreason.model.vocab import HeadStats, dense_stats, head_stats, token_loss
from jaxreason.types import Batch, Totals, TrainState, combine_metrics, count_unique, empty_metrics


def totals_of(batch: Batch) -> Totals:
    """Counts of the whole step, before it is split into microbatches."""
    sequences = count_unique(_sequence_ids(batch), batch.loss_mask)
    prompts = sequences if batch.group_ids is None else count_unique(batch.group_ids, batch.loss_mask)
    # A step without any trained token has zero sums everywhere; dividing by 1 keeps them zero.
    return Totals(*(jnp.maximum(x, 1.0) for x in (jnp.sum(batch.loss_mask), sequences, prompts)))


def _sequence_ids(batch: Batch) -> Array:
    """Ids unique within the step: as given, or row · T + segment."""
    if batch.sequence_ids is not None:
        return batch.sequence_ids
    rows, length = batch.tokens.shape
    return jnp.arange(rows, dtype=jnp.int32)[:, None] * length + batch.segment_ids


def microbatches(batch: Batch, count: int) -> Batch:
    """[B, T] → [count, B/count, T]. Row r goes to microbatch r mod count, so no row leaves its device."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _occupied(pieces: Batch) -> Array:
    """Microbatches up to the last one that holds anything: a rollout that packs well leaves the rest empty."""
    full = jnp.any(pieces.segment_ids > 0, axis=(1, 2))
    return jnp.max(jnp.where(full, jnp.arange(full.shape[0]) + 1, 0))


STATS = ("entropy", "logsumexp", "mean_logp")  # of the head's own pass
OF_FROZEN = ("ref_logp", "ref_kl", "teacher_divergence")  # a supervised loss compares with a model that does not train
_WHOLE_LOGITS = frozenset({*OF_FROZEN, "topk_entropy"})

Frozen = tuple[LlamaConfig, dict]  # a model that does not train: its architecture and its parameters


def batch_loss(
    params: dict,
    config: LlamaConfig,
    loss: Loss,
    batch: Batch,
    totals: Totals,
    temperature: float = 1.0,
    frozen: Frozen | None = None,
    noise: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """This (micro)batch's part of the step's loss and of its metrics; parts add up to the whole.

    ``frozen``: the reference or teacher that a supervised loss compares with. ``noise`` [B, T, D] goes on the embeddings.
    """
    x = hidden(params, config, batch.tokens, batch.positions, batch.segment_ids, noise)
    head = head_kernel(params, config)
    ids = _sequence_ids(batch)
    if loss.kind == "sft":
        return _supervised(x, head, loss, batch, ids, totals, frozen)
    stats = head_stats(x, head, batch.targets, temperature, needs=loss.needs)
    # Without stored log-probs the policy that sampled is the one being updated, and the ratio is exactly 1.
    old = lax.stop_gradient(stats.logp) if batch.old_logp is None else batch.old_logp
    inputs = PolicyInputs(
        stats.logp, old, batch.advantages, batch.loss_mask, ref_logp=batch.ref_logp, sampler_logp=batch.sampler_logp,
        entropy=stats.entropy, sequence_ids=ids, group_ids=batch.group_ids, totals=totals,
        group_tokens=batch.group_tokens, selected=batch.selected, entropy_coef=batch.entropy_coef,
    )  # fmt: skip
    return loss(inputs)


def _supervised(x: Array, head: Array, loss: Loss, batch: Batch, ids: Array, totals: Totals, frozen: Frozen | None):
    """One of three ways through the head: what the loss needs decides, and the numbers are the same."""
    wanted = [name for name in STATS if name in loss.needs]
    weights = {} if batch.token_weights is None else {"token_weights": batch.token_weights}
    if loss.needs & _WHOLE_LOGITS:
        found = from_logits(_whole_logits(loss, wanted), batch.targets, ((x, head), *_frozen_head(frozen, batch)))
        return loss(SftInputs(mask=batch.loss_mask, sequence_ids=ids, totals=totals, **found, **weights))
    if not loss.tokenwise:
        stats = head_stats(x, head, batch.targets, needs=loss.needs)
        optional = {name: getattr(stats, name) for name in wanted} | weights
        return loss(SftInputs(stats.logp, batch.loss_mask, sequence_ids=ids, totals=totals, **optional))

    def piece(stats, aux, totals):
        optional = {name: getattr(stats, name) for name in wanted} | aux
        return loss(SftInputs(logp=stats.logp[None], totals=totals, **{k: v[None] for k, v in optional.items()}))

    aux = {name: value.reshape(-1) for name, value in {"mask": batch.loss_mask, **weights}.items()}
    return token_loss(x.reshape(-1, x.shape[-1]), head, batch.targets.reshape(-1), aux, totals, piece, loss.needs)


def _frozen_head(frozen: Frozen | None, batch: Batch) -> tuple:
    if frozen is None:
        return ()
    config, params = frozen[0], lax.stop_gradient(frozen[1])
    return ((hidden(params, config, batch.tokens, batch.positions, batch.segment_ids), head_kernel(params, config)),)


def _whole_logits(loss: Loss, wanted: list[str]) -> Callable:
    """What ``loss`` reads, from logits [n, V] of the model and, where there is one, of the frozen model."""

    def found(targets: Array, logits: Array, other: Array | None = None) -> dict[str, Array]:
        stats = dense_stats(logits, targets)
        values = {name: getattr(stats, name) for name in ("logp", *wanted)}
        if "topk_entropy" in loss.needs:
            values["topk_entropy"] = lax.stop_gradient(distill.topk_entropy(logits))
        if "ref_logp" in loss.needs:
            values["ref_logp"] = dense_stats(other, targets).logp
        if "ref_kl" in loss.needs:
            values["ref_kl"] = distill.forward_kl(logits, other)
        if "teacher_divergence" in loss.needs:
            values["teacher_divergence"] = loss.divergence(logits, other)
        return values

    return found


@dataclasses.dataclass(frozen=True)
class Noise:
    """NEFTune's noise on the embeddings: a function of the seed, the step and the row, not of how rows are split."""

    alpha: float
    seed: int

    def of(self, step: Array, batch: Batch, width: int) -> Array:
        """[B, T, width] for the rows of a (micro)batch with the step's ``sequence_ids``."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        # A row's ids are row · T + segment with fewer than T segments.
        rows = batch.sequence_ids[:, 0] // batch.tokens.shape[1]
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        return neftune_noise(keys, sequences_of(batch.segment_ids > 0, batch.segment_ids), width, self.alpha)


def make_gradient(
    config: LlamaConfig,
    loss: Loss,
    count: int,
    temperature: float = 1.0,
    frozen_config: LlamaConfig | None = None,
    noise: Noise | None = None,
) -> Callable:
    """``(params, batch, frozen_params=None, step=0) -> (value, metrics, gradient in float32, totals)``.

    Accumulated over ``count`` microbatches by a loop, with layers cast to the compute dtype before it.
    ``frozen_config``: of the model whose parameters are passed; ``step`` decides the noise.
    """

    def gradient(params, batch, frozen_params=None, step=0):
        totals = totals_of(batch)
        batch = dataclasses.replace(batch, sequence_ids=_sequence_ids(batch))
        frozen = None if frozen_config is None else (frozen_config, frozen_params)

        def one(micro):
            added = None if noise is None else noise.of(step, micro, config.embed_dim)
            f = lambda p: batch_loss(p, config, loss, micro, totals, temperature, frozen, added)  # noqa: E731
            (value, metrics), grads = jax.value_and_grad(f, has_aux=True)(weights)
            return value, metrics, grads

        weights = cast_layers(params, config)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        if count == 1:
            value, metrics, grads = one(batch)
            return value, metrics, add_gradients(zeros, grads), totals

        def body(i, carry):
            value, metrics, grads = one(jax.tree.map(lambda x: x[i], pieces))
            metrics = {k: combine_metrics(k, carry[1][k], metrics[k]) for k in metrics}
            return carry[0] + value, metrics, add_gradients(carry[2], grads)

        pieces = microbatches(batch, count)
        shapes = jax.eval_shape(lambda: one(jax.tree.map(lambda x: x[0], pieces)))
        start = (jnp.zeros(()), empty_metrics(shapes[1]), zeros)
        value, metrics, grads = lax.fori_loop(0, _occupied(pieces), body, start)
        return value, metrics, grads, totals

    return gradient


def make_train_step(
    config: LlamaConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    count: int,
    temperature: float = 1.0,
    frozen_config: LlamaConfig | None = None,
    noise: Noise | None = None,
) -> Callable:
    """``step(state, batch, frozen_params=None) -> (state, metrics)``; jit it with the state donated.

    Metrics: the loss's own, ``loss``, ``grad_norm`` (before clipping), ``learning_rate``, ``tokens`` (trained), and
    ``leaf_norms``, the gradient norm of every parameter in the order of ``jax.tree.leaves``, by which a step that is
    not finite names what was not.
    """
    gradient = make_gradient(config, loss, count, temperature, frozen_config, noise)

    def step(state: TrainState, batch: Batch, frozen_params: dict | None = None) -> tuple[TrainState, dict]:
        value, metrics, grads, totals = gradient(state.params, batch, frozen_params, state.step)
        squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            "loss": value,
            "grad_norm": jnp.sqrt(jnp.sum(squares)),
            "leaf_norms": jnp.sqrt(squares),
            "learning_rate": schedule(state.step),
            "tokens": totals.tokens,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def make_score(config: LlamaConfig, count: int, temperature: float) -> Callable:
    """``score(params, batch) -> HeadStats [B, T]`` of the batch's targets: the training graph's forward pass alone."""

    def one(params, micro):
        x = hidden(params, config, micro.tokens, micro.positions, micro.segment_ids)
        return head_stats(x, head_kernel(params, config), micro.targets, temperature)

    def score(params, batch):
        params = cast_layers(params, config)
        if count == 1:
            return one(params, batch)
        pieces = microbatches(batch, count)
        empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:])), HeadStats(*(pieces.loss_mask,) * 4))

        def body(i, out):
            stats = one(params, jax.tree.map(lambda x: x[i], pieces))
            return jax.tree.map(lambda whole, part: whole.at[i].set(part), out, stats)

        stats = lax.fori_loop(0, _occupied(pieces), body, empty)
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch.tokens.shape), stats)

    return score
