"""Arithmetic of speed: what a card's compute, memory and links allow. FLOPs are counted as in ``jaxreason.model.flops``."""

import numpy as np

from jaxreason.model import ModelConfig
from jaxreason.model.flops import matmul_weights
from jaxreason.plan.hlo import Collective
from jaxreason.targets import Target


def kv_bytes_per_token(config: ModelConfig) -> int:
    c = config.arch
    return c.num_layers * 2 * c.num_kv_heads * c.head_dim * np.dtype(_np(config.execution.compute_dtype)).itemsize


def _np(dtype: str) -> str:
    return {"bfloat16": "uint16"}.get(dtype, dtype)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of weights that a decoding step reads."""
    return matmul_weights(config) * np.dtype(_np(config.execution.compute_dtype)).itemsize


def decode_tokens_per_second(config: ModelConfig, target: Target, slots: int, context: float) -> float:
    """Bound by memory bandwidth: every step reads all weights and each sequence's keys and values."""
    step = weight_bytes(config) + slots * context * kv_bytes_per_token(config)
    return slots * target.memory_bytes_per_s / step


def collective_seconds(found: list[Collective], target: Target, hosts: int, devices: int) -> float:
    """Time of all collectives on a ring, none hidden behind compute: between hosts where there are several.

    Each device sends (n−1)/n of the whole array, twice for an all-reduce.
    """
    count = hosts * devices
    link = target.network_bytes_per_s if hosts > 1 else target.nvlink_bytes_per_s
    # A ring through all GPUs crosses hosts at one GPU of each, whose server has a network adapter for every GPU.
    link = min(target.nvlink_bytes_per_s, link * devices) if hosts > 1 else link
    moved = sum(c.total_bytes * (2 if c.kind == "all-reduce" else 1) for c in found)
    return moved * (count - 1) / count / link
