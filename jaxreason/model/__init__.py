"""Llama in Flax Linen, its attention, and its vocabulary head."""

from jaxreason.model.config import PRESETS, LlamaConfig, RopeScaling, param_count, preset
from jaxreason.model.llama import (
    add_gradients,
    cast_layers,
    head_kernel,
    hidden,
    init,
    logits,
    next_logits,
    prefill,
    step_cached,
    unstack,
)

__all__ = [
    "PRESETS",
    "LlamaConfig",
    "RopeScaling",
    "add_gradients",
    "cast_layers",
    "head_kernel",
    "hidden",
    "init",
    "logits",
    "next_logits",
    "param_count",
    "prefill",
    "preset",
    "step_cached",
    "unstack",
]
