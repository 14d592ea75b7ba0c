"""Samplers: from prompts to completions with the log-probabilities of what was drawn.

``protocol.py`` says what the rest of the project assumes of a sampler; ``engine/`` is ours.
"""

from jaxreason.sampler.engine import Engine, EngineSampler
from jaxreason.sampler.factory import make
from jaxreason.sampler.protocol import ROUNDS, Completion, Job, Sampler
from jaxreason.sampler.sampling import Sampling, sampling_of

__all__ = ["ROUNDS", "Completion", "Engine", "EngineSampler", "Job", "Sampler", "Sampling", "make", "sampling_of"]
