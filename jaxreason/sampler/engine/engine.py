"""Continuous batching: prompts in, completions out, over a fixed number of decoding slots.

A prompt's keys and values are computed once, for all tokens but its last, and copied into the slots of its samples;
the last prompt token is then fed like any other, so that every token is drawn in one place. Copying costs one prompt
of memory a slot, a few percent where completions are longer than prompts, and keeps attention one contiguous read.
Decoding runs in jitted chunks; between chunks the host hands out finished sequences and refills their slots. Over
several devices each decodes its share of the slots with its own copy of the weights.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxreason.errors import UserError
from jaxreason.model import ModelConfig
from jaxreason.sampler.engine import cache
from jaxreason.sampler.engine.generation import Generation, Running, prefill_rows
from jaxreason.sampler.engine.spread import devices_for, padded, spread
from jaxreason.sampler.engine.steps import Programs, programs
from jaxreason.sampler.protocol import Completion
from jaxreason.sampler.sampling import Sampling


class Engine:
    """Owns the jitted functions of one model shape and one way of sampling; holds no weights and no buffers.

    Args:
      config: the model.
      stop_ids: any of these ends a completion.
      sampling: how tokens are drawn.
      slots: sequences decoded at once on this process's devices together; rounded up to a multiple of the devices.
      chunk: decoding steps between two looks of the host.
      pad_id: fed where there is no token; it has no influence.

    Engines with the same settings share what is compiled. Completions depend on (weights, prompt, seed, step, prompt
    number, sample index) only: slots, chunk, devices and neighbours change nothing but the rounding of matrix products.
    """

    def __init__(
        self,
        config: ModelConfig,
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
            if not 0 <= token < config.arch.vocab_size:
                raise UserError(f"token id {token} (stop or padding) is outside the vocabulary of {config.arch.vocab_size}")
        self.longest = 0  # limit of the calls so far: where length is free, buffers never become shorter
        self._programs: dict[Mesh | None, Programs] = {}

    def programs(self, mesh: Mesh | None = None) -> Programs:
        """What prefills and decodes with the slots over ``mesh``; None: on one device."""
        if mesh not in self._programs:
            self._programs[mesh] = programs(self.config, self.sampling, self.stop_ids, self.chunk, mesh)
        return self._programs[mesh]

    def kv_bytes(self, max_prompt_tokens: int) -> int:
        """Most bytes of keys and values that this process's devices hold together, for prompts of at most this length."""
        limit = cache.longest(max_prompt_tokens + self.sampling.max_completion_tokens)
        devices = devices_for(self.slots, jax.local_device_count())
        slots, prompts = padded(self.slots, devices), cache.prompt_bucket(max_prompt_tokens, limit)
        rows = prefill_rows(max_prompt_tokens, slots, devices)
        # One layer's prompts are on every device while they are copied into slots.
        copied = cache.num_bytes(self.config, devices * rows, prompts) // (2 * self.config.arch.num_layers) if devices > 1 else 0
        return cache.num_bytes(self.config, slots, limit) + cache.num_bytes(self.config, rows, prompts) + copied

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
        first_prompt: int = 0,
    ) -> list[Completion]:
        """``group_size`` completions of every prompt, ordered by prompt and then by sample.

        Args:
          params: from :func:`jaxreason.model.unstack`. Every device of this process on which they are whole decodes
            (``out_shardings=replicated(mesh)`` puts them there); no other process takes part.
          seed, step: of the draws; the same pair draws the same completions.
          on_tokens: called with (prompt index, sample index, new token ids) after each chunk.
          progress: called with (finished sequences, all sequences, tokens drawn) after each chunk.
          first_prompt: number of the first prompt in the whole step, by which its draws are told from those of prompts
            in other calls and processes; ``Completion.prompt_index`` counts from 0 in this call all the same.

        Raises: UserError for an empty prompt, one with an id outside the vocabulary, and one that leaves no room for
          ``max_completion_tokens`` within the model's positions.
        """
        self._check(prompts, group_size)
        params, mesh = spread(params, self.slots)
        slots = padded(self.slots, 1 if mesh is None else mesh.size)
        run = Generation(self, params, mesh, slots, prompts, group_size, seed, step, first_prompt)
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

    def _completion(self, sequence: Running, params_step: int | None) -> Completion:
        tokens, behaviour_logp, policy_logp = (np.concatenate(column) for column in zip(*sequence.parts))
        return Completion(
            sequence.prompt_index, sequence.sample_index, tokens, behaviour_logp, policy_logp,
            truncated=int(tokens[-1]) not in self.stop_ids, params_step=params_step,
        )  # fmt: skip

    def _check(self, prompts: Sequence[Sequence[int]], group_size: int) -> None:
        if group_size < 1:
            raise UserError(f"group_size is {group_size}; it is at least 1")
        room = self.config.arch.max_positions - self.sampling.max_completion_tokens
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise UserError(f"prompt {index} has no tokens; a prompt has at least one, e.g. the BOS token")
            if len(prompt) > room:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens and max_completion_tokens is "
                    f"{self.sampling.max_completion_tokens}, together more than the model's "
                    f"{self.config.arch.max_positions} positions; shorten the prompt to {max(room, 0)} tokens "
                    "or lower max_completion_tokens"
                )
            low, high = min(prompt), max(prompt)
            if low < 0 or high >= self.config.arch.vocab_size:
                raise UserError(
                    f"prompt {index} has the token id {low if low < 0 else high}; the model's vocabulary has "
                    f"{self.config.arch.vocab_size} entries: is this its tokenizer?"
                )
