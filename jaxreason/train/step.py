"""The one step: (state, batch) -> (state, metrics), for SFT and GRPO alike."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh

from jaxreason.errors import present
from jaxreason.losses import Loss, PolicyInputs, SftInputs, distill
from jaxreason.losses.segments import sequences_of
from jaxreason.losses.sft import neftune_noise
from jaxreason.model import ModelConfig, add_gradients, cast_layers, head_kernel, hidden
from jaxreason.model.chunked import from_logits
from jaxreason.model.vocab import HeadStats, dense_stats, head_stats, token_loss
from jaxreason.train import optimizer as opt
from jaxreason.train.state import abstract_params
from jaxreason.types import Batch, Totals, TrainState, combine_metrics, count_unique, empty_metrics, merge


def totals_of(batch: Batch) -> Totals:
    """Counts of the whole step, before it is split into microbatches."""
    sequences, drawn = (count_unique(_sequence_ids(batch), where) for where in (batch.loss_mask, batch.segment_ids))
    prompts = sequences if batch.group_ids is None else count_unique(batch.group_ids, batch.loss_mask)
    # A step without any trained token has zero sums everywhere; dividing by 1 keeps them zero.
    return Totals(*(jnp.maximum(x, 1.0) for x in (jnp.sum(batch.loss_mask), sequences, prompts, drawn)))


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
COMPARED = ("ref_logp", "ref_kl", "teacher_divergence")  # a supervised loss compares with a second model
_WHOLE_LOGITS = frozenset({*COMPARED, "topk_entropy"})

Second = tuple[ModelConfig, dict]  # the model that a loss compares with: its architecture and its parameters
OWN_LOGP = 1.0  # instead of old log-probs, which are at most 0: those of the update itself
ITSELF: Literal["itself"] = "itself"
BASE: Literal["base"] = "base"
# What a loss compares with: another model; this one as it is, without a gradient; or what its adapters stand beside.
Compared = ModelConfig | Literal["itself", "base"]


def batch_loss(
    params: dict,
    config: ModelConfig,
    loss: Loss,
    batch: Batch,
    totals: Totals,
    temperature: float = 1.0,
    second: Second | None = None,
    noise: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """This (micro)batch's part of the step's loss and of its metrics; parts add up to the whole.

    ``params``: of the whole model. ``second``: the reference or teacher that the loss compares with. ``noise`` [B, T, D] is
    added to the embeddings.
    """
    value, metrics, _ = _loss_by_token(params, config, loss, batch, totals, temperature, second, noise)
    return value, metrics


def _loss_by_token(
    params: dict, config: ModelConfig, loss: Loss, batch: Batch, totals: Totals, temperature: float, second: Second | None,
    noise: Array | None,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:  # fmt: skip
    """``batch_loss``, and for a policy loss ``logp`` and ``entropy`` [B, T] of the targets at ``temperature``."""
    x = hidden(params, config, batch.tokens, batch.positions, batch.segment_ids, noise)
    head = head_kernel(params, config)
    if loss.kind == "sft":
        return *_supervised(x, head, loss, batch, _sequence_ids(batch), totals, second), {}
    stats, divergence = _policy_stats(x, head, loss, batch, temperature, second)
    value, metrics = loss(policy_inputs(stats, batch, totals, divergence))
    return value, metrics, {"logp": stats.logp, "entropy": stats.entropy}


def policy_inputs(stats: HeadStats, batch: Batch, totals: Totals, divergence: Array | None = None) -> PolicyInputs:
    """What a policy loss sees of a (micro)batch whose targets have the statistics ``stats``."""
    # Without stored log-probs the policy that sampled is the one being updated, and the ratio is exactly 1.
    old = lax.stop_gradient(stats.logp)
    if batch.old_logp is not None:
        old = jnp.where(batch.old_logp < OWN_LOGP, batch.old_logp, old)
    return PolicyInputs(
        stats.logp, old, present(batch.advantages, "Batch.advantages"), batch.loss_mask,
        ref_logp=batch.ref_logp, sampler_logp=batch.sampler_logp, entropy=stats.entropy, sequence_ids=_sequence_ids(batch),
        group_ids=batch.group_ids, totals=totals,
        group_tokens=batch.group_tokens, selected=batch.selected, entropy_coef=batch.entropy_coef, kl_coef=batch.kl_coef,
        extras=batch.extras, teacher_divergence=divergence,
    )  # fmt: skip


def _policy_stats(
    x: Array, head: Array, loss: Loss, batch: Batch, temperature: float, second: Second | None
) -> tuple[HeadStats, Array | None]:
    """The head's statistics at the sampling temperature and, where the loss reads it, the divergence from the teacher."""
    if "teacher_divergence" not in loss.needs:
        return head_stats(x, head, batch.targets, temperature, needs=loss.needs), None
    diverge = present(loss.divergence, f"the divergence of {loss.name}")

    def found(targets: Array, logits: Array, theirs: Array) -> tuple[HeadStats, Array]:
        return dense_stats(logits / temperature, targets), diverge(logits, theirs)

    heads = ((x, head), *_second_head(present(second, f"the teacher of {loss.name}"), batch))
    stats, divergence = from_logits(found, batch.targets, heads)
    return stats, divergence if batch.teacher is None else divergence * batch.teacher.taught


def _supervised(
    x: Array, head: Array, loss: Loss, batch: Batch, ids: Array, totals: Totals, second: Second | None
) -> tuple[Array, dict[str, Array]]:
    """One of three ways through the head: what the loss needs decides, and the numbers are the same."""
    wanted = [name for name in STATS if name in loss.needs]
    weights: dict[str, Any] = {} if batch.token_weights is None else {"token_weights": batch.token_weights}
    if loss.needs & _WHOLE_LOGITS:
        found = from_logits(_whole_logits(loss, wanted), batch.targets, ((x, head), *_second_head(second, batch)))
        return loss(SftInputs(mask=batch.loss_mask, sequence_ids=ids, totals=totals, **found, **weights))
    if not loss.tokenwise:
        stats = head_stats(x, head, batch.targets, needs=loss.needs)
        optional = {name: getattr(stats, name) for name in wanted} | weights
        return loss(SftInputs(stats.logp, batch.loss_mask, sequence_ids=ids, totals=totals, **optional))

    def piece(stats: HeadStats, aux: dict[str, Array], totals: Totals) -> tuple[Array, dict[str, Array]]:
        optional = {name: getattr(stats, name) for name in wanted} | aux
        return loss(SftInputs(logp=stats.logp[None], totals=totals, **{k: v[None] for k, v in optional.items()}))

    aux = {name: value.reshape(-1) for name, value in {"mask": batch.loss_mask, **weights}.items()}
    return token_loss(x.reshape(-1, x.shape[-1]), head, batch.targets.reshape(-1), aux, totals, piece, loss.needs)


def _second_head(second: Second | None, batch: Batch) -> tuple:
    if second is None:
        return ()
    config, params = second[0], lax.stop_gradient(second[1])
    if batch.teacher is None:
        x = hidden(params, config, batch.tokens, batch.positions, batch.segment_ids)
    else:
        view = batch.teacher
        x = hidden(params, config, view.tokens, view.positions, view.segment_ids)
        x = jnp.take_along_axis(x, view.source[..., None], axis=1)
    return ((x, head_kernel(params, config)),)


def _whole_logits(loss: Loss, wanted: list[str]) -> Callable:
    """What ``loss`` reads, from logits [n, V] of the model and, where there is one, of the second model."""

    def found(targets: Array, logits: Array, other: Array | None = None) -> dict[str, Array]:
        stats = dense_stats(logits, targets)
        values = {name: getattr(stats, name) for name in ("logp", *wanted)}
        if "topk_entropy" in loss.needs:
            values["topk_entropy"] = lax.stop_gradient(distill.topk_entropy(logits))
        if loss.needs.isdisjoint(COMPARED):
            return values
        theirs = present(other, f"the model that {loss.name} compares with")
        if "ref_logp" in loss.needs:
            values["ref_logp"] = dense_stats(theirs, targets).logp
        if "ref_kl" in loss.needs:
            values["ref_kl"] = distill.forward_kl(logits, theirs)
        if "teacher_divergence" in loss.needs:
            values["teacher_divergence"] = present(loss.divergence, f"the divergence of {loss.name}")(logits, theirs)
        return values

    return found


@dataclasses.dataclass(frozen=True)
class Noise:
    """NEFTune's noise on the embeddings: a function of the seed, the step and the row, not of how rows are split."""

    alpha: float
    seed: int

    def of(self, step: Array | int, batch: Batch, width: int) -> Array:
        """[B, T, width] for the rows of a (micro)batch with the step's ``sequence_ids``."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        # A row's ids are row · T + segment with fewer than T segments.
        rows = present(batch.sequence_ids, "Batch.sequence_ids")[:, 0] // batch.tokens.shape[1]
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        return neftune_noise(keys, sequences_of(batch.segment_ids > 0, batch.segment_ids), width, self.alpha)


def make_gradient(
    config: ModelConfig,
    loss: Loss,
    count: int,
    temperature: float = 1.0,
    second_config: Compared | None = None,
    noise: Noise | None = None,
) -> Callable:
    """``(params, batch, second_params=None, step=0, frozen={}) -> (value, metrics, gradient in float32, by_token)``.

    Accumulated over ``count`` microbatches by a loop, with layers cast to the compute dtype before it. ``second_config``: of
    the model whose parameters are passed as ``second_params``, or ``ITSELF`` or ``BASE``, which need none; ``step`` decides the
    noise; ``frozen`` holds the parameters of the model that get no gradient. ``by_token``: of a policy loss ``logp`` and
    ``entropy`` of the targets, [B, T] float32, 0 where a row is empty.
    """

    def gradient(
        params: dict, batch: Batch, second_params: dict | None = None, step: Array | int = 0, frozen: dict | None = None
    ) -> tuple[Array, dict[str, Array], dict, dict[str, Array]]:
        chex.assert_rank(jax.tree.leaves(batch), 2)
        chex.assert_equal_shape(jax.tree.leaves(batch))  # at tracing: every field is [B, T]
        totals = totals_of(batch)
        batch = dataclasses.replace(batch, sequence_ids=_sequence_ids(batch))
        def one(micro: Batch) -> tuple[Array, dict[str, Array], dict, dict[str, Array]]:
            added = None if noise is None else noise.of(step, micro, config.arch.embed_dim)

            def value_of(trained: dict) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
                whole = merge(trained, rest)
                value, metrics, tokens = _loss_by_token(whole, config, loss, micro, totals, temperature, second, added)
                return value, (metrics, tokens)

            (value, (metrics, tokens)), grads = jax.value_and_grad(value_of, has_aux=True)(weights)
            return value, metrics, grads, tokens

        weights, rest = cast_layers(params, config), cast_layers(frozen or {}, config)
        second: Second | None = None
        if isinstance(second_config, ModelConfig):
            second = second_config, present(second_params, "second_params")
        elif second_config == ITSELF:
            second = config, merge(weights, rest)
        elif second_config == BASE:
            second = config, rest
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        if count == 1:
            value, metrics, grads, tokens = one(batch)
            return value, metrics, add_gradients(zeros, grads), tokens

        def body(i: Array, carry: tuple) -> tuple:
            value, metrics, grads, tokens = one(jax.tree.map(lambda x: x[i], pieces))
            metrics = {k: combine_metrics(k, carry[1][k], metrics[k]) for k in metrics}
            tokens = {k: carry[3][k].at[i].set(tokens[k]) for k in tokens}
            return carry[0] + value, metrics, add_gradients(carry[2], grads), tokens

        pieces = microbatches(batch, count)
        shapes = jax.eval_shape(lambda: one(jax.tree.map(lambda x: x[0], pieces)))
        by_token = {k: jnp.zeros((count, *x.shape), x.dtype) for k, x in shapes[3].items()}
        start = (jnp.zeros(()), empty_metrics(shapes[1]), zeros, by_token)
        value, metrics, grads, by_token = lax.fori_loop(0, _occupied(pieces), body, start)
        return value, metrics, grads, {k: _rows(x, batch.tokens.shape) for k, x in by_token.items()}

    return gradient


def _rows(pieces: Array, shape: tuple[int, ...]) -> Array:
    """[B, T] of what microbatches [count, B/count, T] hold, in the batch's order."""
    return pieces.swapaxes(0, 1).reshape(shape)


def make_train_step(
    config: ModelConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: Callable,
    count: int,
    temperature: float = 1.0,
    second_config: Compared | None = None,
    noise: Noise | None = None,
    seed: int = 0,
    skips: bool = False,
) -> Callable:
    """``step(state, batch, second_params=None) -> (state, metrics, by_token)``; jit it with the state donated.

    ``seed`` is that of the rounding of bfloat16 parameters (:func:`jaxreason.train.optimizer.apply`). With ``skips`` a step
    whose loss or gradient norm is not finite leaves the parameters and the optimizer's state as they are, apart from its
    place in the schedule; ``step`` counts it. Without it the program has no such choice.

    Metrics: the loss's own, ``loss``, ``grad_norm`` (before clipping), ``learning_rate``, ``tokens`` (supervised; 0 where
    nothing was), and ``leaf_norms``, the gradient norm of every trained parameter in the order of ``jax.tree.leaves``, by
    which a step that is not finite names what was not. ``by_token`` is that of :func:`make_gradient`, under the parameters
    that the step begins with.
    """
    gradient = make_gradient(config, loss, count, temperature, second_config, noise)

    def step(
        state: TrainState, batch: Batch, second_params: dict | None = None
    ) -> tuple[TrainState, dict, dict[str, Array]]:
        value, metrics, grads, by_token = gradient(state.params, batch, second_params, state.step, state.frozen)
        squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, norm = opt.apply(state.params, updates, state.step, seed), jnp.sqrt(jnp.sum(squares))
        if skips:
            old, new = (state.params, state.opt_state), (params, opt_state)
            params, opt_state = opt.chosen(jnp.isfinite(value) & jnp.isfinite(norm), new, old)
        metrics |= {
            "loss": value,
            "grad_norm": norm,
            "leaf_norms": jnp.sqrt(squares),
            "learning_rate": schedule(state.step),
            "tokens": jnp.sum(batch.loss_mask),
        }
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics, by_token

    return step


def abstract_second(second: Compared | None, mesh: Mesh) -> dict | None:
    """The parameters that a step with ``second_config`` is given, as shapes, in the compute dtype."""
    return abstract_params(second, mesh, second.execution.compute_dtype) if isinstance(second, ModelConfig) else None


def make_score(config: ModelConfig, count: int, temperature: float) -> Callable:
    """``score(params, batch) -> HeadStats [B, T]`` of the batch's targets: the training graph's forward pass alone."""

    def one(params: dict, micro: Batch) -> HeadStats:
        x = hidden(params, config, micro.tokens, micro.positions, micro.segment_ids)
        return head_stats(x, head_kernel(params, config), micro.targets, temperature)

    def score(params: dict, batch: Batch) -> HeadStats:
        params = cast_layers(params, config)
        if count == 1:
            return one(params, batch)
        pieces = microbatches(batch, count)
        empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:])), HeadStats(*(pieces.loss_mask,) * 4))

        def body(i: Array, out: HeadStats) -> HeadStats:
            stats = one(params, jax.tree.map(lambda x: x[i], pieces))
            return jax.tree.map(lambda whole, part: whole.at[i].set(part), out, stats)

        stats = lax.fori_loop(0, _occupied(pieces), body, empty)
        return jax.tree.map(lambda x: _rows(x, batch.tokens.shape), stats)

    return score


def make_sum_of_squares(config: ModelConfig, count: int, temperature: float) -> Callable:
    """``squares(params, batch) -> [B, T]``, sum_v pi_v^2 of the next-token distribution at ``temperature``: how sure it is."""

    def one(params: dict, micro: Batch) -> Array:
        x = hidden(params, config, micro.tokens, micro.positions, micro.segment_ids)

        def squares(_: Array, logits: Array) -> Array:
            return jnp.exp(jax.nn.logsumexp(2.0 * logits / temperature, -1) - 2.0 * jax.nn.logsumexp(logits / temperature, -1))

        return from_logits(squares, micro.targets, ((x, head_kernel(params, config)),))

    def squares(params: dict, batch: Batch) -> Array:
        params = cast_layers(params, config)
        return _rows(lax.map(lambda micro: one(params, micro), microbatches(batch, count)), batch.tokens.shape)

    return squares
