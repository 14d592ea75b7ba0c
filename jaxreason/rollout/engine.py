"""Continuous batching: prompts in, completions out, over a fixed number of decoding slots.

A prompt's keys and values are computed once, for all tokens but its last, and copied into the slots of its samples;
the last prompt token is then fed like any other, so that every token is drawn in one place. Copying costs one prompt
of memory a slot, a few percent where completions are longer than prompts, and keeps attention one contiguous read.
Decoding runs in jitted chunks; between chunks the host hands out finished sequences and refills their slots.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxreason.errors import UserError
from jaxreason.model import LlamaConfig, next_logits, prefill, step_cached
from jaxreason.rollout import cache
from jaxreason.rollout.sampling import Sampling, sample, sequence_key

_PREFILL_TOKENS = 4096  # padded prompt tokens in one prefill call: enough to fill a GPU, little memory


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample of one prompt."""

    prompt_index: int
    sample_index: int
    tokens: np.ndarray  # [n] int32; the stop token, if one was drawn, is the last
    sampler_logp: np.ndarray  # [n] float32, under the distribution that was sampled (greedy: 0)
    full_logp: np.ndarray  # [n] float32, under softmax(logits / temperature) without truncation (greedy: temperature 1)
    truncated: bool  # ended by max_completion_tokens, not by a stop token
    params_step: int | None  # optimizer step of the weights that drew it, as the caller said


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
    """Device state of the slots, N of them; row i of every cache belongs to slot i."""

    token: Array  # [N] int32, the last known token, not yet fed
    position: Array  # [N] int32, its position
    drawn: Array  # [N] int32, completion tokens drawn so far
    live: Array  # [N] bool
    key: Array  # [N] key of the sequence


@dataclasses.dataclass
class _Sequence:
    """Host side of one running completion."""

    prompt_index: int
    sample_index: int
    prompt_tokens: int
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    @property
    def drawn(self) -> int:
        return sum(len(part[0]) for part in self.parts)


class Engine:
    """Owns the jitted functions of one model shape and one way of sampling; holds no weights and no buffers.

    Args:
      config: the model.
      stop_ids: any of these ends a completion.
      sampling: how tokens are drawn.
      slots: sequences decoded at once.
      chunk: decoding steps between two looks of the host.
      pad_id: fed where there is no token; it has no influence.

    Engines with the same settings share what is compiled. Completions depend on (weights, prompt, seed, step, prompt
    index, sample index) only: slots, chunk and neighbours change nothing but the rounding of matrix products.
    """

    def __init__(
        self,
        config: LlamaConfig,
        stop_ids: Iterable[int],
        sampling: Sampling,
        slots: int,
        chunk: int = 64,
        pad_id: int = 0,
    ):
        self.config, self.sampling, self.slots, self.chunk, self.pad_id = config, sampling, slots, chunk, pad_id
        self.stop_ids = tuple(sorted(set(stop_ids)))
        for name, value in (("slots", slots), ("chunk", chunk)):
            if value < 1:
                raise UserError(f"{name} is {value}; it is at least 1")
        for token in (*self.stop_ids, pad_id):
            if not 0 <= token < config.vocab_size:
                raise UserError(f"token id {token} (stop or padding) is outside the vocabulary of {config.vocab_size}")
        self._prefill = _prefill_of(config)
        self._decode = _decode_of(config, sampling, self.stop_ids, chunk)

    def kv_bytes(self, max_prompt_tokens: int) -> int:
        """Most bytes of keys and values that are held at once for prompts of at most this length."""
        limit = cache.longest(max_prompt_tokens + self.sampling.max_completion_tokens)
        prompts, rows = cache.prompt_bucket(max_prompt_tokens, limit), self._prefill_rows(max_prompt_tokens)
        return cache.num_bytes(self.config, self.slots, limit) + cache.num_bytes(self.config, rows, prompts)

    def _prefill_rows(self, longest_prompt: int) -> int:
        """Prompts in one prefill call: never more than slots, which a group size of 1 could fill."""
        return max(1, min(self.slots, _PREFILL_TOKENS // longest_prompt))

    def compiles(self) -> int:
        """Variants of prefill and decoding compiled so far; it stops growing once every length bucket has been met."""
        return sum(function._cache_size() for function in (self._prefill, self._decode))

    def generate(
        self,
        params: dict,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        seed: int,
        step: int,
        on_tokens: Callable[[int, int, np.ndarray], None] | None = None,
        progress: Callable[[int, int, int], None] | None = None,
        params_step: int | None = None,
    ) -> list[Completion]:
        """``group_size`` completions of every prompt, ordered by prompt and then by sample.

        Args:
          params: from :func:`jaxreason.model.unstack`.
          seed, step: of the draws; the same pair draws the same completions.
          on_tokens: called with (prompt index, sample index, new token ids) after each chunk.
          progress: called with (finished sequences, all sequences, tokens drawn) after each chunk.

        Raises: UserError for an empty prompt, one with an id outside the vocabulary, and one that leaves no room for
          ``max_completion_tokens`` within the model's positions.
        """
        self._check(prompts, group_size)
        run = _Run(self, params, prompts, group_size, seed, step)
        finished: dict[tuple[int, int], Completion] = {}
        while run.refill():
            for sequence, ended in run.advance():
                if on_tokens is not None:
                    on_tokens(sequence.prompt_index, sequence.sample_index, sequence.parts[-1][0])
                if ended:
                    finished[sequence.prompt_index, sequence.sample_index] = self._completion(sequence, params_step)
            if progress is not None:
                progress(len(finished), len(prompts) * group_size, run.tokens)
        return [finished[key] for key in sorted(finished)]

    def _completion(self, sequence: _Sequence, params_step: int | None) -> Completion:
        tokens, sampler_logp, full_logp = (np.concatenate(column) for column in zip(*sequence.parts))
        return Completion(
            sequence.prompt_index, sequence.sample_index, tokens, sampler_logp, full_logp,
            truncated=int(tokens[-1]) not in self.stop_ids, params_step=params_step,
        )  # fmt: skip

    def _check(self, prompts: Sequence[Sequence[int]], group_size: int) -> None:
        if group_size < 1:
            raise UserError(f"group_size is {group_size}; it is at least 1")
        room = self.config.max_positions - self.sampling.max_completion_tokens
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UserError(f"prompt {index} has no tokens; a prompt has at least one, e.g. the BOS token")
            if len(prompt) > room:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens and max_completion_tokens is "
                    f"{self.sampling.max_completion_tokens}, together more than the model's "
                    f"{self.config.max_positions} positions; shorten the prompt to {max(room, 0)} tokens "
                    "or lower max_completion_tokens"
                )
            low, high = min(prompt), max(prompt)
            if low < 0 or high >= self.config.vocab_size:
                raise UserError(
                    f"prompt {index} has the token id {low if low < 0 else high}; the model's vocabulary has "
                    f"{self.config.vocab_size} entries: is this its tokenizer?"
                )



class _Run:
    """One call of ``generate``: the queue, the slots and what is in them."""

    def __init__(self, engine: Engine, params: dict, prompts: Sequence[Sequence[int]], group_size: int, seed, step):
        self.engine, self.params, self.prompts = engine, params, prompts
        self.group_size, self.seed, self.step = group_size, np.uint32(seed), np.uint32(step)
        self.next = 0  # sequences given a slot so far; number n is sample n % G of prompt n // G
        self.running: list[_Sequence | None] = [None] * engine.slots
        longest_prompt = max(map(len, prompts), default=1)
        self.limit = cache.longest(longest_prompt + engine.sampling.max_completion_tokens)
        useful = 1 << (min(len(prompts), -(-engine.slots // group_size)) - 1).bit_length() if prompts else 1
        self.rows = min(useful, engine._prefill_rows(longest_prompt))
        self.slots, self.caches = _empty_slots(engine), None
        self.first_row, self.prompt_caches = -self.rows, None  # prompts first_row … + rows − 1 are on the device
        self.tokens = 0

    def refill(self) -> bool:
        """Puts queued sequences into free slots; false when none runs and none is left."""
        free = [slot for slot, sequence in enumerate(self.running) if sequence is None]
        while free and self.next < len(self.prompts) * self.group_size:
            if self.next // self.group_size >= self.first_row + self.rows:
                self._prefill(self.next // self.group_size)
            ready = min(self.first_row + self.rows, len(self.prompts)) * self.group_size - self.next
            self._admit(free[:ready])
            free = free[ready:]
        return any(self.running)

    def advance(self) -> Iterator[tuple[_Sequence, bool]]:
        """One chunk; yields every sequence that ran in it and whether it ended."""
        self._fit()
        # With sequences waiting, a chunk also ends once a quarter of the slots stands idle.
        waiting = self.next < len(self.prompts) * self.group_size
        idle = max(1, self.engine.slots // 4) if waiting else self.engine.slots
        self.slots, self.caches, drawn = self.engine._decode(
            self.params, self.slots, self.caches, np.int32(self.engine.slots - idle)
        )
        tokens, sampler_logp, full_logp, counts, live = jax.device_get((*drawn, self.slots.live))
        for slot, sequence in enumerate(self.running):
            if sequence is None:
                continue
            count = counts[slot]
            self.tokens += int(count)
            sequence.parts.append(tuple(column[:count, slot] for column in (tokens, sampler_logp, full_logp)))
            if not live[slot]:
                self.running[slot] = None
            yield sequence, not live[slot]

    def _prefill(self, first: int) -> None:
        batch = [list(prompt[:-1]) for prompt in self.prompts[first : first + self.rows]]
        length = cache.prompt_bucket(max(map(len, batch)), self.limit)
        tokens = np.full((self.rows, length), self.engine.pad_id, np.int32)
        segment_ids = np.zeros_like(tokens)
        for row, prompt in enumerate(batch):
            tokens[row, : len(prompt)], segment_ids[row, : len(prompt)] = prompt, 1
        self.prompt_caches = None  # freed before its successor is made
        self.prompt_caches, self.first_row = self.engine._prefill(self.params, tokens, segment_ids), first

    def _admit(self, slots: list[int]) -> None:
        size = self.engine.slots
        # Rows of unused entries name slots past the end, each another one.
        where, row, token, position, prompt_index, sample_index = np.zeros((6, size), np.int32)
        where[:] = size + np.arange(size)
        for i, slot in enumerate(slots):
            prompt_index[i], sample_index[i] = divmod(self.next, self.group_size)
            prompt = self.prompts[prompt_index[i]]
            self.running[slot] = _Sequence(int(prompt_index[i]), int(sample_index[i]), len(prompt))
            where[i], row[i] = slot, prompt_index[i] - self.first_row
            token[i], position[i] = prompt[-1], len(prompt) - 1
            self.next += 1
        self._fit()
        self.caches = cache.copy_rows(self.caches, self.prompt_caches, where, row)
        self.slots = _admit(self.slots, where, token, position, self.seed, self.step, prompt_index, sample_index)

    def _fit(self) -> None:
        """Makes the buffers as long as the next chunk needs them."""
        longest = self.engine.sampling.max_completion_tokens
        needed = max(s.prompt_tokens + min(s.drawn + self.engine.chunk, longest) for s in self.running if s is not None)
        length = cache.bucket(needed, self.limit)
        if self.caches is None:
            self.caches = cache.allocate(self.engine.config, self.engine.slots, length)
        self.caches = cache.resize(self.caches, length)


def _empty_slots(engine: Engine) -> _Slots:
    zeros = np.zeros(engine.slots, np.int32)
    keys = jax.random.split(jax.random.key(0), engine.slots)
    return _Slots(jnp.full_like(zeros, engine.pad_id), jnp.array(zeros), jnp.array(zeros), jnp.array(zeros > 0), keys)


@functools.cache
def _prefill_of(config: LlamaConfig):
    return jax.jit(lambda params, tokens, segment_ids: prefill(params, config, tokens, segment_ids))


@functools.cache
def _decode_of(config: LlamaConfig, sampling: Sampling, stop_ids: tuple[int, ...], chunk: int):
    settings = {"config": config, "sampling": sampling, "stop_ids": stop_ids, "chunk": chunk}
    return jax.jit(functools.partial(_decode, **settings), donate_argnums=(1, 2))


@jax.jit
def _admit(slots: _Slots, where, token, position, seed, step, prompt_index, sample_index) -> _Slots:
    """Starts new sequences: entry i of the other arrays goes to slot ``where[i]``; slots past the end are skipped."""
    keys = jax.vmap(sequence_key, (None, None, 0, 0))(seed, step, prompt_index, sample_index)

    def put(old, new):
        return old.at[where].set(new, mode="drop", unique_indices=True)

    return _Slots(
        token=put(slots.token, token),
        position=put(slots.position, position),
        drawn=put(slots.drawn, 0),
        live=put(slots.live, True),
        key=put(slots.key, keys),
    )

def _decode(
    params: dict, slots: _Slots, caches: cache.Caches, idle_at: Array, *, config, sampling, stop_ids, chunk
) -> tuple[_Slots, cache.Caches, tuple[Array, Array, Array, Array]]:
    """Up to ``chunk`` steps; fewer once no more than ``idle_at`` slots are live.

    Returns the slots, the caches, and tokens, sampler_logp, full_logp [chunk, N] with the number [N] of valid entries.
    """
    size, length = slots.token.shape[0], caches[0][0].shape[2]
    stops = np.array(stop_ids, np.int32)

    def body(carry):
        i, slots, caches, (tokens, sampler_logp, full_logp, counts) = carry
        token, position = slots.token[:, None], slots.position[:, None]
        visible = jnp.arange(length) <= position[..., None]
        x, caches = step_cached(params, config, token, position, caches, cache.write_at(slots.position), visible)
        new, sampler, full = sample(next_logits(params, config, x[:, 0]), slots.key, slots.drawn, sampling)
        drawn = slots.drawn + slots.live
        ended = jnp.any(new[:, None] == stops, axis=-1) | (drawn >= sampling.max_completion_tokens)
        columns = zip((tokens, sampler_logp, full_logp), (new, sampler, full))
        outputs = (*(column.at[i].set(row) for column, row in columns), counts + slots.live)
        slots = _Slots(
            token=jnp.where(slots.live, new, slots.token),
            position=slots.position + slots.live,
            drawn=drawn,
            live=slots.live & ~ended,
            key=slots.key,
        )
        return i + 1, slots, caches, outputs

    def unfinished(carry):
        i, slots, *_ = carry
        return (i < chunk) & (jnp.sum(slots.live) > idle_at)

    logp = jnp.zeros((chunk, size), jnp.float32)
    outputs = (jnp.zeros((chunk, size), jnp.int32), logp, logp, jnp.zeros(size, jnp.int32))
    _, slots, caches, outputs = lax.while_loop(unfinished, body, (jnp.int32(0), slots, caches, outputs))
    return slots, caches, outputs
