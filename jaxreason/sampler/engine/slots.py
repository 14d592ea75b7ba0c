"""How many sequences are decoded at once where the config says ``auto``: as many as the memory that is left holds."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from jaxreason.errors import UserError
from jaxreason.model import ModelConfig, param_count
from jaxreason.sampler.engine import cache
from jaxreason.sampler.engine.generation import prefill_rows

_MARGIN = 2**30  # of a device, for what prefill makes on its way
_RESERVED = 2 * 2**30  # of a GPU's pool, which plans keep free as well
_OF_A_MACHINE = 0.5  # of a CPU's memory, which other programs need too


@dataclasses.dataclass(frozen=True)
class Room:
    """What a rollout finds on each device."""

    limit_bytes: int  # that may be used
    resident_bytes: int  # that stay while completions are drawn: the train state unless it is offloaded, a reference, a teacher
    devices: int  # of one process
    processes: int


def room_here(resident_bytes: int) -> Room:
    """On this machine: its GPUs' pool less 2 GiB, or half of its memory, shared by all devices."""
    devices = jax.local_devices()
    statistics = devices[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        limit = statistics["bytes_limit"] - _RESERVED
    else:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = int(_OF_A_MACHINE * machine) // len(devices)
    return Room(limit, resident_bytes, len(devices), jax.process_count())


def that_fit(model: ModelConfig, longest_prompt: int, completion: int, sequences: int, room: Room) -> int:
    """Slots over all devices: the most that fit, and no more than there are sequences.

    A device holds the weights that decoding reads, prompts' keys and values, and for each slot its keys and values and three
    float32 arrays over the vocabulary. Raises UserError where not one slot fits.

    Args:
      model: the network.
      longest_prompt, completion: most tokens of either.
      sequences: of a rollout, over all processes.
      room: what is on each device.
    """
    weights = param_count(model) * jnp.dtype(model.execution.compute_dtype).itemsize
    length = cache.longest(longest_prompt + completion)
    one = cache.num_bytes(model, 1, length) + 3 * 4 * model.arch.vocab_size
    share = -(-sequences // (room.devices * room.processes))
    padded = cache.prompt_bucket(max(longest_prompt - 1, 1), length)
    prompts = cache.num_bytes(model, prefill_rows(longest_prompt, share, devices=1), padded)
    free = room.limit_bytes - room.resident_bytes - weights - prompts - _MARGIN
    slots = min(share, free // one)
    if slots < 1:
        raise UserError(
            f"rollout.slots=auto: not one sequence of {length} positions fits: a device allows {room.limit_bytes / 2**30:.1f} "
            f"GiB, of which {(room.limit_bytes - free) / 2**30:.1f} are taken while completions are drawn. Set "
            "rollout.offload_state=true or a shorter rollout.max_completion_tokens, or use more devices"
        )
    slots = slots // 8 * 8 if slots >= 8 else slots
    return slots * room.devices * room.processes
