"""What a rollout asks of whatever draws completions. The engine of this package is one implementation.

A sampler of your own (a server, another engine) is a class with these methods; ``rollout.sampler`` names a function that
makes one, see :func:`jaxreason.sampler.make`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from jaxreason.sampler.sampling import Sampling

ROUNDS = 64  # draws of one step that differ in their noise: first round, resampling rounds, and the second turn as the last


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample of one prompt."""

    prompt_index: int
    sample_index: int
    tokens: np.ndarray  # [n] int32; the stop token, if one was drawn, is the last
    behaviour_logp: np.ndarray  # [n] float32, under the distribution that was sampled (greedy: 0)
    policy_logp: np.ndarray  # [n] float32, under softmax(logits / temperature) without truncation (greedy: temperature 1)
    truncated: bool  # ended by max_completion_tokens, not by a stop token
    params_step: int | None  # optimizer step of the weights that drew it


@dataclasses.dataclass(frozen=True)
class Job:
    """How prompts are to be completed. The same job and weights draw the same completions."""

    sampling: Sampling
    samples: int = 1  # completions of each prompt
    seed: int = 0  # of the run
    draw: int = 0  # number of this draw within the run: other numbers give other noise
    slots: int = 64  # at most this many sequences at once in this process; a sampler may choose fewer
    first_prompt: int = 0  # number of the first prompt within the draw, over all processes


Progress = Callable[[int, int, int], None]  # (finished completions, all completions, tokens drawn so far)


class Sampler(Protocol):
    """Draws completions with the weights that it was given last."""

    def load(self, params: dict, step: int) -> None:
        """Takes the model's parameters (as ``jaxreason.model`` holds them, sharded over the mesh) of optimizer ``step``."""
        ...

    def release(self) -> None:
        """Lets go of the weights, so that an update has their memory; ``load`` comes before the next ``generate``."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], job: Job, progress: Progress | None = None) -> list[Completion]:
        """``job.samples`` completions of every prompt of token ids, ordered by prompt, then by sample."""
        ...

    def memory_bytes(self, longest_prompt: int, job: Job) -> int:
        """Most bytes that the devices of this process hold for such a job, in addition to the weights."""
        ...
