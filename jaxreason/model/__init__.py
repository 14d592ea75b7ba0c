"""The network: decoders of several families in Flax Linen, their attention, and their vocabulary head."""

from jaxreason.model.config import Adapter, Architecture, Execution, ModelConfig, RopeScaling
from jaxreason.model.decoder import (
    add_gradients,
    cast_layers,
    frozen_base,
    full_shapes,
    head_kernel,
    hidden,
    init,
    init_adapters,
    logits,
    next_logits,
    param_count,
    prefill,
    shapes,
    step_cached,
    unstack,
)
from jaxreason.model.families import FAMILIES, Family, HfFormat, family_of, make_config
from jaxreason.model.presets import HUB, PRESETS, preset

__all__ = [
    "FAMILIES",
    "HUB",
    "PRESETS",
    "Adapter",
    "Architecture",
    "Execution",
    "Family",
    "HfFormat",
    "ModelConfig",
    "RopeScaling",
    "add_gradients",
    "cast_layers",
    "family_of",
    "frozen_base",
    "full_shapes",
    "head_kernel",
    "hidden",
    "init",
    "init_adapters",
    "logits",
    "make_config",
    "next_logits",
    "param_count",
    "prefill",
    "preset",
    "shapes",
    "step_cached",
    "unstack",
]
