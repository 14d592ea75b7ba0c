"""Which distribution a token is drawn from, the draw, and its log-probabilities.

One uniform number a token and the inverse of the cumulative distribution: Gumbel noise would cost one random number
per vocabulary entry. Truncation finds its threshold by bisection instead of sorting the vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxreason import config as cfg
from jaxreason.errors import UserError

_BLOCK = 128  # vocabulary entries whose cumulative sum is formed only for the block that was drawn


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn: softmax(logits / temperature), then top-k, then top-p, then min-p.

    Each truncation acts on what the one before left, renormalised. Tokens whose probability ties with the last one
    kept are kept too, so the result does not depend on an order.
    """

    max_completion_tokens: int
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this mass (arXiv 1904.09751); 1: all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0: all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one (arXiv 2407.01082); 0: all."""

    def __post_init__(self):
        if self.max_completion_tokens < 1:
            raise UserError(f"max_completion_tokens is {self.max_completion_tokens}; it is at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it is a finite number, 0 (greedy) or above")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}; it is above 0 and at most 1 (1 keeps every token)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it is 0 (keeps every token) or more")
        if not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min_p is {self.min_p}; it is between 0 (keeps every token) and 1")


def sampling_of(draw: cfg.Draw) -> Sampling:
    """What a config's section says."""
    return Sampling(
        temperature=draw.temperature, top_p=draw.top_p, top_k=draw.top_k, min_p=draw.min_p,
        max_completion_tokens=draw.max_completion_tokens,
    )  # fmt: skip


def sequence_key(seed: Array, step: Array, prompt: Array, sample: Array) -> Array:
    """The key of one completion: a function of these four numbers and of nothing else."""
    key = jax.random.key(seed)
    for number in (step, prompt, sample):
        key = jax.random.fold_in(key, number)
    return key


def sample(logits: Array, keys: Array, index: Array, sampling: Sampling) -> tuple[Array, Array, Array]:
    """Draws one token a row.

    Args:
      logits: [B, V] float32.
      keys: [B] keys of the sequences.  index: [B] int32, how many tokens each sequence has drawn before.

    Returns: tokens [B] int32; their log-probability [B] under the distribution they were drawn from (greedy: 0);
      and under softmax(logits / temperature) before truncation (greedy: temperature 1).
    """
    greedy = sampling.temperature == 0.0
    scaled = logits if greedy else logits / sampling.temperature
    shifted = scaled - jnp.max(scaled, axis=-1, keepdims=True)
    full = jnp.exp(shifted)  # the most likely token has weight exactly 1
    log_total = jnp.log(jnp.sum(full, axis=-1))
    if greedy:
        return _first_zero(shifted), jnp.zeros_like(log_total), -log_total
    kept = truncate(full, sampling)
    uniform = jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i)))(keys, index)
    tokens = draw(kept, uniform)
    chosen = _pick(shifted, tokens)
    return tokens, chosen - jnp.log(jnp.sum(kept, axis=-1)), chosen - log_total


def _first_zero(shifted: Array) -> Array:
    """First index [B] int32 where [B, V] is 0: two vectorised reductions, where argmax is one that is not on a CPU."""
    last = shifted.shape[-1] - 1  # also what a row of NaNs gives
    index = lax.broadcasted_iota(jnp.int32, shifted.shape, 1)
    return jnp.min(jnp.where(shifted == 0.0, index, last), axis=-1)


def truncate(weights: Array, sampling: Sampling) -> Array:
    """Weights [B, V], whose largest is 1 in every row, with those of the tokens that are cut set to 0."""
    if 0 < sampling.top_k < weights.shape[-1]:
        floor = _threshold(weights, jnp.ones_like(weights), jnp.float32(sampling.top_k))
        weights = jnp.where(weights >= floor, weights, 0.0)
    if sampling.top_p < 1.0:
        floor = _threshold(weights, weights, sampling.top_p * jnp.sum(weights, axis=-1, keepdims=True))
        weights = jnp.where(weights >= floor, weights, 0.0)
    return jnp.where(weights >= sampling.min_p, weights, 0.0)


def _threshold(weights: Array, mass: Array, amount: Array) -> Array:
    """Largest τ [B, 1] for which Σ mass[weights ≥ τ] ≥ amount, exact to the bit.

    Non-negative floats order as their bit patterns do, so 31 halvings find τ with one masked sum each.
    """
    bits = lax.bitcast_convert_type(weights, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough mass at low, too little at high
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle, mass, 0.0), axis=-1, keepdims=True) >= amount
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((weights.shape[0], 1), jnp.int32)
    low, _ = lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, lax.bitcast_convert_type(jnp.float32(2), jnp.int32))))
    return lax.bitcast_convert_type(low, jnp.float32)


def draw(weights: Array, uniform: Array) -> Array:
    """First token [B] int32 whose cumulative weight exceeds uniform · Σ weights; never one of weight 0.

    weights: [B, V] ≥ 0 with a positive sum.  uniform: [B] in [0, 1).
    """
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    target = uniform * cumulative[:, -1]
    block = _first_above(sums, cumulative, target)
    before = jnp.where(block > 0, _pick(cumulative, jnp.maximum(block - 1, 0)), 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _first_above(inside, jnp.cumsum(inside, axis=-1), target - before)


def _pick(values: Array, index: Array) -> Array:
    """values [B, n] at index [B]."""
    return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]


def _first_above(weights: Array, cumulative: Array, target: Array) -> Array:
    """First index [B] of positive weight whose cumulative value exceeds target [B]; the last positive one if none does.

    A parallel prefix sum is not monotone to the last bit, so positivity is checked and not derived.
    """
    positive = weights > 0.0
    hit = positive & (cumulative > target[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), last).astype(jnp.int32)
