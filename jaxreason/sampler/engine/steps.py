"""What runs on the devices: prompts into keys and values, sequences into slots, and chunks of decoding steps."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxreason.model import ModelConfig, next_logits, prefill, step_cached
from jaxreason.model.attention import resolve
from jaxreason.sampler.engine import cache
from jaxreason.sampler.engine.spread import COLUMNS, SPLIT, WHOLE, over, placed
from jaxreason.sampler.sampling import Sampling, sample, sequence_key


def one_length(config: ModelConfig) -> bool:
    """Whether a decoding step costs the same whatever the length of its buffers, so that one program does for all.

    cuDNN reads the visible entries of each slot and no others; other backends read whole buffers.
    """
    run = config.execution
    return resolve(run.attention, run.compute_dtype, config.arch.head_dim) == "cudnn"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Device state of the slots, N of them; row i of every cache belongs to slot i."""

    token: Array  # [N] int32, the last known token, not yet fed
    position: Array  # [N] int32, its position
    drawn: Array  # [N] int32, completion tokens drawn so far
    live: Array  # [N] bool
    key: Array  # [N] key of the sequence


Drawn = tuple[Array, ...]  # tokens, behaviour_logp, policy_logp [chunk, N], and the number [N] of valid entries
Carry = tuple[Array, Slots, cache.Caches, Drawn]


class Programs(NamedTuple):
    """The two large programs of an engine."""

    prefill: jax.stages.Wrapped  # (params, tokens [R, S], segment_ids [R, S]) -> keys and values
    decode: jax.stages.Wrapped  # (params, slots, caches, idle_at) -> slots, caches, what was drawn


def programs(config: ModelConfig, sampling: Sampling, stop_ids: tuple[int, ...], chunk: int, mesh: Mesh | None) -> Programs:
    """Jitted, and shared by all engines with these settings."""
    return Programs(_prefill_of(config, mesh), _decode_of(config, sampling, stop_ids, chunk, mesh))


@functools.cache
def _prefill_of(config: ModelConfig, mesh: Mesh | None) -> jax.stages.Wrapped:
    def fill(params: dict, tokens: Array, segment_ids: Array) -> cache.Caches:
        return prefill(params, config, tokens, segment_ids)

    return jax.jit(over(mesh, fill, (WHOLE, SPLIT, SPLIT), SPLIT))


@functools.cache
def _decode_of(
    config: ModelConfig, sampling: Sampling, stop_ids: tuple[int, ...], chunk: int, mesh: Mesh | None
) -> jax.stages.Wrapped:
    one = functools.partial(_decode, config=config, sampling=sampling, stop_ids=stop_ids, chunk=chunk)
    results = SPLIT, SPLIT, (COLUMNS, COLUMNS, COLUMNS, SPLIT)
    decode = over(mesh, one, (WHOLE, SPLIT, SPLIT, WHOLE), results)
    return jax.jit(decode, donate_argnums=(1, 2))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty_slots(slots: int, pad_id: int, mesh: Mesh | None = None) -> Slots:
    zeros = jnp.zeros(slots, jnp.int32)
    made = Slots(zeros + pad_id, zeros, zeros, zeros > 0, jax.random.split(jax.random.key(0), slots))
    return made if mesh is None else jax.lax.with_sharding_constraint(made, placed(mesh))


@functools.partial(jax.jit, static_argnames="mesh")
def admit(
    slots: Slots,
    new: ArrayLike,
    token: ArrayLike,
    position: ArrayLike,
    seed: ArrayLike,
    step: ArrayLike,
    prompt_number: ArrayLike,
    sample_index: ArrayLike,
    *,
    mesh: Mesh | None,
) -> Slots:
    """Starts a sequence in every slot that is ``new``, from the entries [N] of the other arrays."""

    def admitted(
        slots: Slots,
        new: Array,
        token: Array,
        position: Array,
        seed: Array,
        step: Array,
        prompt_number: Array,
        sample_index: Array,
    ) -> Slots:
        keys = jax.vmap(sequence_key, (None, None, 0, 0))(seed, step, prompt_number, sample_index)
        fresh = Slots(token, position, jnp.zeros_like(token), jnp.ones_like(new), keys)
        return jax.tree.map(lambda a, b: jnp.where(new, a, b), fresh, slots)

    arguments = SPLIT, SPLIT, SPLIT, SPLIT, WHOLE, WHOLE, SPLIT, SPLIT
    return over(mesh, admitted, arguments, SPLIT)(slots, new, token, position, seed, step, prompt_number, sample_index)


@functools.partial(jax.jit, static_argnums=2)
def take(slots: Slots, places: Array, mesh: Mesh | None) -> Slots:
    """The slots at ``places``, which count from 0 on every device, as the only ones."""
    return over(mesh, lambda slots, places: jax.tree.map(lambda x: x[places], slots), (SPLIT, SPLIT), SPLIT)(slots, places)


def _decode(
    params: dict,
    slots: Slots,
    caches: cache.Caches,
    idle_at: Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    chunk: int,
) -> tuple[Slots, cache.Caches, Drawn]:
    """Up to ``chunk`` steps; fewer once no more than ``idle_at`` slots are live.

    Returns the slots, the caches, and tokens, behaviour_logp, policy_logp [chunk, N] with the number [N] of valid entries.
    """
    size, length = slots.token.shape[0], caches[0][0].shape[2]
    stops = np.array(stop_ids, np.int32)

    def body(carry: Carry) -> Carry:
        i, slots, caches, (tokens, behaviour_logp, policy_logp, counts) = carry
        # A slot that is not live attends to one entry: what reads a cache by its length then reads no more of it.
        position = jnp.where(slots.live, slots.position, 0)
        visible = jnp.arange(length) <= position[:, None, None]
        x, caches = step_cached(
            params, config, slots.token[:, None], position[:, None], caches, cache.write_at(position), visible
        )
        new, sampler, full = sample(next_logits(params, config, x[:, 0]), slots.key, slots.drawn, sampling)
        drawn = slots.drawn + slots.live
        ended = jnp.any(new[:, None] == stops, axis=-1) | (drawn >= sampling.max_completion_tokens)
        columns = zip((tokens, behaviour_logp, policy_logp), (new, sampler, full))
        outputs = (*(column.at[i].set(row) for column, row in columns), counts + slots.live)
        slots = Slots(
            token=jnp.where(slots.live, new, slots.token),
            position=slots.position + slots.live,
            drawn=drawn,
            live=slots.live & ~ended,
            key=slots.key,
        )
        return i + 1, slots, caches, outputs

    def unfinished(carry: Carry) -> Array:
        i, slots, *_ = carry
        return (i < chunk) & (jnp.sum(slots.live) > idle_at)

    logp = jnp.zeros((chunk, size), jnp.float32)
    outputs: Drawn = (jnp.zeros((chunk, size), jnp.int32), logp, logp, jnp.zeros(size, jnp.int32))
    start: Carry = (jnp.int32(0), slots, caches, outputs)
    _, slots, caches, outputs = lax.while_loop(unfinished, body, start)
    return slots, caches, outputs
