"""FLOPs of a token: the convention by which plans and metrics count.

A token costs 6 FLOPs for every weight of a matrix product (the tied table once, as the head; the look-up is free), 4 for one
that is frozen beside adapters and gets no gradient, and causal attention to its own segment only costs 6·L·N·H·Σs²/Σs over
segments of s tokens. Rematerialised work is not counted, so that MFU is useful work over peak.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np

from jaxreason.model import lora
from jaxreason.model.config import ModelConfig
from jaxreason.model.decoder import shapes


def matmul_weights(config: ModelConfig) -> int:
    """Weights that each token is multiplied with: every Dense kernel, and the head's table once."""
    leaves = jax.tree.leaves_with_path(shapes(config))
    kernels = sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")
    return kernels + config.arch.vocab_size * config.arch.embed_dim


def weight_flops_per_token(config: ModelConfig) -> float:
    """Forward and backward products of a token with weights: 6 FLOPs for each that trains, 4 for each beside adapters."""
    if config.adapter is None:
        return 6 * matmul_weights(config)
    pairs = jax.tree.leaves_with_path(lora.shapes(shapes(config), config.adapter))
    looked_up = "lora_b" if not config.arch.tie_embeddings else None  # rows of the embedding's B, by which nothing is multiplied
    thin = sum(
        math.prod(leaf.shape)
        for path, leaf in pairs
        if path[-1].key != "magnitude" and [key.key for key in path] != ["embedding_lora", looked_up]
    )
    return 4 * matmul_weights(config) + 6 * thin


def train_flops_per_token(config: ModelConfig, segment_lengths: Sequence[int] | np.ndarray) -> float:
    """Forward and backward, averaged over the tokens of segments of these lengths."""
    s, c = np.asarray(segment_lengths, np.float64), config.arch
    attention = 6 * c.num_layers * c.num_heads * c.head_dim * (s**2).sum() / s.sum()
    return weight_flops_per_token(config) + attention
