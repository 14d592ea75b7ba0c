"""Sums over the sequences of packed rows, linear in T."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Sequences(NamedTuple):
    """Where the supervised positions are and which sequence of its row each position belongs to."""

    live: Array  # [B, T] bool
    number: Array | None  # [B, T] int32, counts from 0 within a row; None: one sequence a row


def sequences_of(live: Array, sequence_ids: Array | None) -> Sequences:
    """Numbers the runs of equal ``sequence_ids`` [B, T] in each row; ids may be any integers."""
    if sequence_ids is None:
        return Sequences(live, None)
    changed = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    first = jnp.zeros_like(sequence_ids[:, :1], dtype=jnp.int32)
    return Sequences(live, jnp.concatenate([first, jnp.cumsum(changed, axis=1, dtype=jnp.int32)], axis=1))


def sequence_sum(values: Array, sequences: Sequences) -> Array:
    """[B, T]: at every position the sum of ``values`` [B, T] over the supervised positions of its sequence."""
    values = jnp.where(sequences.live, values, 0.0)
    if sequences.number is None:
        return jnp.broadcast_to(jnp.sum(values, axis=1, keepdims=True), values.shape)
    # One row at a time, so that rows sharded over devices need no communication.
    return jax.vmap(_row_sum)(values, sequences.number)


def sequence_max(values: Array, sequences: Sequences) -> Array:
    """[B, T]: at every position the largest of ``values`` [B, T], which are at least 0, over the supervised positions of its
    sequence (0 if none)."""
    values = jnp.where(sequences.live, values, 0.0)
    if sequences.number is None:
        return jnp.broadcast_to(jnp.max(values, axis=1, keepdims=True), values.shape)
    return jax.vmap(_row_max)(values, sequences.number)


def sequence_counts(sequences: Sequences) -> Array:
    """[B, T] float32: at every position the number of supervised positions of its sequence."""
    return sequence_sum(jnp.ones(sequences.live.shape, jnp.float32), sequences)


def sequence_mean(values: Array, sequences: Sequences) -> Array:
    """[B, T]: at every position the mean of ``values`` over the supervised positions of its sequence (0 if none)."""
    return sequence_sum(values, sequences) / jnp.maximum(sequence_counts(sequences), 1.0)


def _row_sum(values: Array, index: Array) -> Array:
    sums = jax.ops.segment_sum(values, index, num_segments=values.shape[0], indices_are_sorted=True)
    return sums[index]


def _row_max(values: Array, index: Array) -> Array:
    largest = jax.ops.segment_max(values, index, num_segments=values.shape[0], indices_are_sorted=True)
    return largest[index]
