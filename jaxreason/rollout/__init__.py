"""Rollouts: prompts to completions with the sampler's log-probabilities."""

from jaxreason.rollout.engine import Completion, Engine
from jaxreason.rollout.sampling import Sampling, sampling_of

__all__ = ["Completion", "Engine", "Sampling", "sampling_of"]
