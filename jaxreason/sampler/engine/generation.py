"""One call of ``Engine.generate``, seen from the host: which sequence is in which slot, and which comes next."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from jaxreason.sampler.engine import cache
from jaxreason.sampler.engine.spread import count
from jaxreason.sampler.engine.steps import admit, empty_slots, one_length, take

if TYPE_CHECKING:
    from jaxreason.sampler.engine.engine import Engine

_PREFILL_TOKENS = 4096  # padded prompt tokens of one prefill call on a device: enough to fill a GPU, little memory

_FEWEST = 4  # slots of a device: fewer are hardly faster, and each number is a program more to compile


def prefill_rows(longest_prompt: int, slots: int, devices: int) -> int:
    """Prompts in one prefill call: never more than slots, which a group size of 1 could fill."""
    return devices * max(1, min(slots // devices, _PREFILL_TOKENS // longest_prompt))


def fewer(slots: int, live: int) -> int:
    """How many of ``slots`` decode on when ``live`` still run: all, or a quarter, or a quarter of that, down to 4."""
    while slots >= 2 * _FEWEST and live <= max(_FEWEST, -(-slots // 4)):
        slots = max(_FEWEST, -(-slots // 4))
    return slots


@dataclasses.dataclass
class Running:
    """Host side of one running completion."""

    prompt_index: int
    sample_index: int
    prompt_tokens: int
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    @property
    def drawn(self) -> int:
        return sum(len(part[0]) for part in self.parts)


class Generation:
    """The queue, the slots and what is in them.

    ``params`` and ``mesh`` are from :func:`jaxreason.sampler.engine.spread.spread`, ``slots`` is a multiple of the devices.
    """

    def __init__(
        self,
        engine: "Engine",
        params: dict,
        mesh: Mesh | None,
        slots: int,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        seed: int,
        step: int,
        first_prompt: int,
    ):
        self.engine, self.params, self.mesh, self.prompts = engine, params, mesh, prompts
        self.programs, self.devices = engine.programs(mesh), count(mesh)
        self.group_size, self.seed, self.step, self.first_prompt = group_size, np.uint32(seed), np.uint32(step), first_prompt
        self.next = 0  # sequences given a slot so far; number n is sample n % G of prompt n // G
        self.running: list[Running | None] = [None] * slots
        longest_prompt = max(map(len, prompts), default=1)
        self.limit = cache.longest(longest_prompt + engine.sampling.max_completion_tokens)
        self.one_length = one_length(engine.config)
        if self.one_length:
            self.limit = engine.longest = max(engine.longest, self.limit)
        useful = 1 << (min(len(prompts), -(-slots // group_size)) - 1).bit_length() if prompts else 1
        useful = -(-useful // self.devices) * self.devices
        self.rows = min(useful, prefill_rows(longest_prompt, slots, self.devices))
        self.slots = empty_slots(slots, engine.pad_id, mesh)
        self.caches: cache.Caches = []  # none before the first sequence has a slot
        self.first_row = -self.rows  # prompts first_row … + rows − 1 are on the device
        self.prompt_caches: cache.Caches = []
        self.tokens = 0

    @property
    def waiting(self) -> bool:
        """Whether there are sequences that had no slot yet."""
        return self.next < len(self.prompts) * self.group_size

    def refill(self) -> bool:
        """Puts queued sequences into free slots; false when none runs and none is left."""
        share = len(self.running) // self.devices
        free = [slot for slot, sequence in enumerate(self.running) if sequence is None]
        free.sort(key=lambda slot: slot % share)  # one on each device, then the next on each
        while free and self.waiting:
            if self.next // self.group_size >= self.first_row + self.rows:
                self._prefill(self.next // self.group_size)
            ready = min(self.first_row + self.rows, len(self.prompts)) * self.group_size - self.next
            self._admit(free[:ready])
            free = free[ready:]
        return any(self.running)

    def advance(self) -> Iterator[tuple[Running, bool]]:
        """One chunk; yields every sequence that ran in it and whether it ended."""
        self._shrink()
        self._fit()
        # With sequences waiting, a device's chunk also ends once a quarter of its slots stands idle.
        share = len(self.running) // self.devices
        idle = max(1, share // 4) if self.waiting else share
        self.slots, self.caches, drawn = self.programs.decode(self.params, self.slots, self.caches, np.int32(share - idle))
        tokens, behaviour_logp, policy_logp, counts, live = jax.device_get((*drawn, self.slots.live))
        for slot, sequence in enumerate(self.running):
            if sequence is None:
                continue
            number = counts[slot]
            self.tokens += int(number)
            sequence.parts.append(tuple(column[:number, slot] for column in (tokens, behaviour_logp, policy_logp)))
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
        self.prompt_caches = []  # freed before its successor is made
        self.prompt_caches, self.first_row = self.programs.prefill(self.params, tokens, segment_ids), first

    def _admit(self, slots: list[int]) -> None:
        new = np.zeros(len(self.running), bool)
        row, token, position, prompt_number, sample_index = np.zeros((5, len(new)), np.int32)
        for slot in slots:
            index, sample_index[slot] = divmod(self.next, self.group_size)
            prompt = self.prompts[index]
            self.running[slot] = Running(index, int(sample_index[slot]), len(prompt))
            new[slot], row[slot], prompt_number[slot] = True, index - self.first_row, self.first_prompt + index
            token[slot], position[slot] = prompt[-1], len(prompt) - 1
            self.next += 1
        self._fit()
        self.caches = cache.copy_rows(self.caches, self.prompt_caches, new, row, self.mesh)
        self.slots = admit(
            self.slots, new, token, position, self.seed, self.step, prompt_number, sample_index, mesh=self.mesh
        )

    def _shrink(self) -> None:
        """Once nothing waits, moves what still runs into fewer slots: a step takes its time for all of them."""
        if self.one_length:
            return
        share = len(self.running) // self.devices
        groups = [range(first, first + share) for first in range(0, len(self.running), share)]
        size = fewer(share, max(sum(self.running[slot] is not None for slot in group) for group in groups))
        if self.waiting or size == share:
            return
        # On each device: those that run first, in order, then any others.
        kept = [sorted(group, key=lambda slot: self.running[slot] is None)[:size] for group in groups]
        places = np.array([slot - group[0] for group, slots in zip(groups, kept) for slot in slots], np.int32)
        self.running = [self.running[slot] for slots in kept for slot in slots]
        self.prompt_caches = []
        self.slots, self.caches = take(self.slots, places, self.mesh), cache.take(self.caches, places, self.mesh)

    def _fit(self) -> None:
        """Makes the buffers as long as the next chunk needs them; where length is free, as long as any will."""
        longest = self.engine.sampling.max_completion_tokens
        needed = max(s.prompt_tokens + min(s.drawn + self.engine.chunk, longest) for s in self.running if s is not None)
        length = self.limit if self.one_length else cache.bucket(needed, self.limit)
        if not self.caches:
            self.caches = cache.allocate(self.engine.config, len(self.running), length, self.mesh)
        self.caches = cache.resize(self.caches, length, self.mesh)
