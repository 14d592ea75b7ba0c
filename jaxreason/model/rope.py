"""Rotary position embeddings (arXiv 2104.09864) with Llama 3's frequency rescaling."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxreason.model.config import Architecture


def inverse_frequencies(arch: Architecture) -> np.ndarray:
    """Angular step per position of each channel pair, [H/2] float32.

    Default rope: theta^(-2i/H). ``llama3`` divides low frequencies (wavelength above original/low_freq_factor) by
    ``factor``, keeps high ones (below original/high_freq_factor) and interpolates between.
    """
    # Angles at position 10^5 magnify the last bit, so the order is transformers', float32 apart from the power: numpy's in
    # float32 differs from torch's at 126 of 800 frequencies (four thetas, five widths), the exact one, rounded, at 4.
    exponent = np.arange(0, arch.head_dim, 2, dtype=np.float32) / np.float32(arch.head_dim)
    powers = np.power(np.float64(arch.rope_theta), exponent.astype(np.float64)).astype(np.float32)
    frequencies = (np.float32(1.0) / powers).astype(np.float32)
    scaling = arch.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    wavelength = 2 * math.pi / frequencies
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = np.where(wavelength > low, frequencies / scaling.factor, frequencies)
    scaled = np.where((wavelength <= low) & (wavelength >= high), blended, scaled)
    return scaled.astype(np.float32)


def rope_tables(positions: Array, arch: Architecture) -> tuple[Array, Array]:
    """Cosines and sines of the angles, each [B, T, 1, H/2] float32, for positions [B, T]."""
    angles = positions.astype(jnp.float32)[:, :, None, None] * inverse_frequencies(arch)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Rotates channel pairs (i, i + H/2) of x [B, T, heads, H] by their angles; computed in float32."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
