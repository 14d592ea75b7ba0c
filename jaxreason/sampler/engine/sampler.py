"""The engine behind the protocol that rollouts and evaluations use."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxreason.model import ModelConfig, unstack
from jaxreason.sampler.engine.engine import Engine
from jaxreason.sampler.protocol import Completion, Job, Progress
from jaxreason.sharding import replicated

OnTokens = Callable[[int, int, np.ndarray], None]


class EngineSampler:
    """A :class:`jaxreason.sampler.Sampler` that decodes on this process's devices, each with whole weights.

    Args:
      model: the network; its compute dtype is that of decoding.
      stop_ids: any of these ends a completion.
      mesh: of training, over which the parameters that ``load`` is given are sharded.
    """

    def __init__(self, model: ModelConfig, stop_ids: Sequence[int], mesh: Mesh):
        self._model, self._stop_ids = model, tuple(stop_ids)
        self._unstack = jax.jit(lambda params: unstack(params, model), out_shardings=replicated(mesh))
        self._weights: dict | None = None
        self._step: int | None = None
        self._engines: dict[tuple, Engine] = {}

    def load(self, params: dict, step: int) -> None:
        self._weights = None  # freed before its successor is made
        self._weights, self._step = self._unstack(params), step

    def release(self) -> None:
        self._weights = None

    def engine(self, job: Job) -> Engine:
        """The engine that draws such jobs; it holds no weights."""
        key = (job.sampling, job.slots)
        if key not in self._engines:
            self._engines[key] = Engine(self._model, self._stop_ids, job.sampling, job.slots)
        return self._engines[key]

    def generate(self, prompts: Sequence[Sequence[int]], job: Job, progress: Progress | None = None) -> list[Completion]:
        return self._generate(prompts, job, progress=progress)

    def stream(self, prompts: Sequence[Sequence[int]], job: Job, on_tokens: OnTokens) -> list[Completion]:
        """As ``generate``; ``on_tokens`` is called with (prompt index, sample index, new token ids) while it goes on."""
        return self._generate(prompts, job, on_tokens=on_tokens)

    def _generate(
        self, prompts: Sequence[Sequence[int]], job: Job, progress: Progress | None = None, on_tokens: OnTokens | None = None
    ) -> list[Completion]:
        if self._weights is None:
            raise RuntimeError("the sampler has no weights: load them first")
        return self.engine(job).generate(
            self._weights, prompts, job.samples, job.seed, job.draw, on_tokens, progress, self._step, job.first_prompt
        )

    def memory_bytes(self, longest_prompt: int, job: Job) -> int:
        return self.engine(job).kv_bytes(longest_prompt)
