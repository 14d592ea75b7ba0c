"""FLOPs of a token: the convention by which plans and metrics count.

A token costs 6 FLOPs for every weight of a matrix product (the tied table once, as the head; the look-up is free) and
causal attention to its own segment only, 6·L·N·H·Σs²/Σs over segments of s tokens. Rematerialised work is not counted, so
that MFU is useful work over peak.
"""

import numpy as np

from jaxreason.model.config import LlamaConfig, param_count


def matmul_weights(config: LlamaConfig) -> int:
    """Weights that each token is multiplied with."""
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    return param_count(config) - lookup - config.embed_dim * (2 * config.num_layers + 1)


def train_flops_per_token(config: LlamaConfig, segment_lengths) -> float:
    """Forward and backward, averaged over the tokens of segments of these lengths."""
    s = np.asarray(segment_lengths, np.float64)
    attention = 6 * config.num_layers * config.num_heads * config.head_dim * (s**2).sum() / s.sum()
    return 6 * matmul_weights(config) + attention
