"""The one step: (state, batch) -> (state, metrics), for SFT and GRPO alike."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jaxreason.losses import Loss, PolicyInputs, SftInputs
from jaxreason.model import LlamaConfig, head_kernel, hidden
from jaxreason.model.vocab import HeadStats, head_stats, token_loss
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


STATS = ("entropy", "logsumexp", "mean_logp")


def batch_loss(
    params: dict, config: LlamaConfig, loss: Loss, batch: Batch, totals: Totals, temperature: float = 1.0
) -> tuple[Array, dict[str, Array]]:
    """This (micro)batch's part of the step's loss and of its metrics; parts add up to the whole."""
    x = hidden(params, config, batch.tokens, batch.positions, batch.segment_ids)
    head = head_kernel(params, config)
    wanted = [name for name in STATS if name in loss.needs]
    ids = _sequence_ids(batch)
    if loss.kind == "sft" and loss.tokenwise:

        def piece(stats, aux, totals):
            optional = {name: getattr(stats, name)[None] for name in wanted}
            value, metrics = loss(SftInputs(stats.logp[None], aux["mask"][None], totals=totals, **optional))
            return value, metrics

        aux = {"mask": batch.loss_mask.reshape(-1)}
        flat = x.reshape(-1, x.shape[-1])
        return token_loss(flat, head, batch.targets.reshape(-1), aux, totals, piece, loss.needs)
    stats = head_stats(x, head, batch.targets, temperature, needs=loss.needs)
    optional = {name: getattr(stats, name) for name in wanted}
    if loss.kind == "sft":
        return loss(SftInputs(stats.logp, batch.loss_mask, sequence_ids=ids, totals=totals, **optional))
    # Without stored log-probs the policy that sampled is the one being updated, and the ratio is exactly 1.
    old = lax.stop_gradient(stats.logp) if batch.old_logp is None else batch.old_logp
    inputs = PolicyInputs(
        stats.logp, old, batch.advantages, batch.loss_mask, ref_logp=batch.ref_logp, sampler_logp=batch.sampler_logp,
        entropy=stats.entropy, sequence_ids=ids, group_ids=batch.group_ids, totals=totals,
        group_tokens=batch.group_tokens, selected=batch.selected,
    )  # fmt: skip
    return loss(inputs)


def make_gradient(config: LlamaConfig, loss: Loss, count: int, temperature: float = 1.0) -> Callable:
    """(params, batch) -> (value, metrics, gradient in float32), accumulated over ``count`` microbatches by a loop."""

    def gradient(params, batch):
        totals = totals_of(batch)
        batch = dataclasses.replace(batch, sequence_ids=_sequence_ids(batch))

        def one(micro):
            f = lambda p: batch_loss(p, config, loss, micro, totals, temperature)  # noqa: E731
            (value, metrics), grads = jax.value_and_grad(f, has_aux=True)(params)
            return value, metrics, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

        if count == 1:
            return *one(batch), totals

        def body(i, carry):
            value, metrics, grads = one(jax.tree.map(lambda x: x[i], pieces))
            metrics = {k: combine_metrics(k, carry[1][k], metrics[k]) for k in metrics}
            return carry[0] + value, metrics, jax.tree.map(jnp.add, carry[2], grads)

        pieces = microbatches(batch, count)
        shapes = jax.eval_shape(lambda: one(jax.tree.map(lambda x: x[0], pieces)))
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
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
) -> Callable:
    """``step(state, batch) -> (state, metrics)``; jit it with the state donated.

    Metrics: the loss's own, ``loss``, ``grad_norm`` (before clipping), ``learning_rate``, ``tokens`` (trained), and
    ``leaf_norms``, the gradient norm of every parameter in the order of ``jax.tree.leaves``, by which a step that is
    not finite names what was not.
    """
    gradient = make_gradient(config, loss, count, temperature)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        value, metrics, grads, totals = gradient(state.params, batch)
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
