"""Advantages that differ from token to token: over [B, T], all rows of the optimizer step at once."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxreason.losses.segments import Sequences, sequences_of


def reward_to_go(rewards: Array, sequences: Sequences, gamma: float = 1.0) -> Array:
    """[B, T] G_t = r_t + gamma G_{t+1} within each sequence, over its supervised positions only."""
    live = sequences.live
    rewards = jnp.where(live, rewards, 0.0).astype(jnp.float32)
    index = jnp.zeros(live.shape, jnp.int32) if sequences.number is None else sequences.number
    last = jnp.concatenate([index[:, 1:] != index[:, :-1], jnp.ones_like(live[:, :1])], axis=1)
    # A masked position passes the sum on undiscounted; the last position of a sequence takes nothing from its right.
    decay = jnp.where(last, 0.0, jnp.where(live, gamma, 1.0))

    def step(carry: Array, column: tuple[Array, Array]) -> tuple[Array, Array]:
        carry = column[1] + column[0] * carry
        return carry, carry

    _, returns = jax.lax.scan(step, jnp.zeros(live.shape[0], jnp.float32), (decay.T, rewards.T), reverse=True)
    returns = returns.T
    return jnp.where(live, returns, 0.0)


def reinforce_pp_tokens(
    scores: Array,
    old_logp: Array,
    ref_logp: Array,
    mask: Array,
    sequence_ids: Array | None = None,
    *,
    kl_coef: float = 1e-3,
    gamma: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-8,
    whiten: Literal["token", "none"] = "token",
) -> Array:
    """[B, T] REINFORCE++ (2501.03262): token reward -kl_coef k1, plus the score at the last token; reward-to-go,
    discounted by ``gamma``; whitened over all tokens of the step, or not (``none``).

    ``scores`` [B, T] holds each sequence's reward at every position of it.
    """
    live = mask > 0
    sequences = sequences_of(live, sequence_ids)
    penalty = jnp.where(live, old_logp - ref_logp, 0.0)
    rewards = jnp.where(_last_supervised(sequences), scores, 0.0) - kl_coef * penalty
    returns = reward_to_go(rewards, sequences, gamma)
    return returns if whiten == "none" else whitened(returns, live, ddof=ddof, eps=eps)


def whitened(values: Array, live: Array, *, ddof: int = 1, eps: float = 1e-8) -> Array:
    """[B, T] (x - mean) / (std + eps) over the positions where ``live``, exactly 0 where all are equal; 0 elsewhere."""
    n = jnp.maximum(jnp.sum(live, dtype=jnp.float32), 1.0)
    differ = jnp.max(jnp.where(live, values, -jnp.inf)) > jnp.min(jnp.where(live, values, jnp.inf))
    centred = jnp.where(live & differ, values - jnp.sum(jnp.where(live, values, 0.0)) / n, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(centred)) / jnp.maximum(n - ddof, 1.0)) + eps
    return centred / jnp.where(std > 0, std, 1.0)


def _last_supervised(sequences: Sequences) -> Array:
    """[B, T] bool: the last supervised position of each sequence."""
    after = reward_to_go(jnp.ones(sequences.live.shape, jnp.float32), sequences)
    return sequences.live & (after == 1)
