"""This package's sampler: continuous batching over a fixed number of decoding slots."""

from jaxreason.sampler.engine.engine import Engine
from jaxreason.sampler.engine.sampler import EngineSampler

__all__ = ["Engine", "EngineSampler"]
