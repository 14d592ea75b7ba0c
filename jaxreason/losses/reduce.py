"""Aggregation: how per-token losses become one number.

Every aggregation is a set of token weights, loss = sum_t weight_t * loss_t, whose denominators are totals of the whole
optimizer step; so the loss of a step is the sum of the losses of its microbatches, however it is split.
"""

from typing import get_args

import jax
import jax.numpy as jnp
from jax import Array

from jaxreason.errors import UserError, present
from jaxreason.losses.axes import Reduce
from jaxreason.losses.inputs import AnyInputs, PolicyInputs, clean, totals_of
from jaxreason.losses.segments import Sequences, sequence_counts
from jaxreason.types import Totals


def reduction_weights(
    name: Reduce,
    inputs: PolicyInputs,
    sequences: Sequences,
    totals: Totals,
    max_completion_tokens: int | None = None,
    sequence_count: str = "trained",
) -> Array:
    """[B, T] weights, 0 at masked positions. With n_i the supervised tokens of sequence i:

    - ``seq-mean-token-mean``: 1 / (n_i * sequences). GRPO (2402.03300).
    - ``token-mean``: 1 / tokens. DAPO (2503.14476).
    - ``seq-mean-token-sum``: 1 / sequences.
    - ``token-sum``: 1, or 1 / max_completion_tokens where that is set.
    - ``token-sum/const``: 1 / (max_completion_tokens * sequences). Dr.GRPO (2503.20783).
    - ``prompt-mean``: 1 / (tokens of the prompt * prompts). ScaleRL (2510.13786).

    ``sequences`` are those with a supervised token, or with ``sequence_count="drawn"`` all that were drawn (TRL).

    Raises UserError for ``token-sum/const`` without the constant, and for ``prompt-mean`` without group ids, or in a
    microbatch without ``group_tokens`` (a prompt's completions may lie in several microbatches).
    """
    count = _at_least_one(totals.sequences if sequence_count == "trained" else present(totals.drawn, "Totals.drawn"))
    if name == "seq-mean-token-mean":
        weights = 1.0 / (jnp.maximum(sequence_counts(sequences), 1.0) * count)
    elif name == "token-mean":
        weights = 1.0 / _at_least_one(totals.tokens)
    elif name == "seq-mean-token-sum":
        weights = 1.0 / count
    elif name == "token-sum":
        weights = jnp.float32(1.0 / (max_completion_tokens or 1))
    elif name == "token-sum/const":
        if max_completion_tokens is None:
            raise UserError("reduce token-sum/const divides by a constant: set the option max_completion_tokens")
        weights = 1.0 / (max_completion_tokens * count)
    elif name == "prompt-mean":
        weights = 1.0 / (jnp.maximum(_group_tokens(inputs), 1.0) * _at_least_one(totals.prompts))
    else:
        raise UserError(f"reduce is {name!r}; it is one of {', '.join(get_args(Reduce))}")
    return jnp.where(sequences.live, weights, 0.0)


def group_token_counts(group_ids: Array, mask: Array) -> Array:
    """[B, T] float32: supervised tokens of each position's prompt, over all rows given (the whole optimizer step)."""
    return group_sums((mask > 0).astype(jnp.float32), group_ids)


def group_sums(values: Array, group_ids: Array) -> Array:
    """[B, T] float32: the sum of ``values`` [B, T] over the positions of each position's prompt, over all rows given."""
    flat, values = group_ids.reshape(-1), values.reshape(-1)
    order = jnp.argsort(flat)
    ordered = flat[order]
    run = jnp.cumsum(jnp.concatenate([jnp.zeros((1,), jnp.int32), (ordered[1:] != ordered[:-1]).astype(jnp.int32)]))
    sums = jax.ops.segment_sum(values[order], run, num_segments=flat.shape[0], indices_are_sorted=True)[run]
    return jnp.zeros_like(values).at[order].set(sums).reshape(group_ids.shape)


def whole_step(inputs: AnyInputs) -> AnyInputs:
    """The inputs with ``totals`` and, of groups, ``group_tokens`` filled in if this batch is the whole optimizer
    step."""
    if inputs.totals is not None:
        return inputs
    values = dict(vars(inputs)) | {"totals": totals_of(*clean(inputs))}
    if values.get("group_ids") is not None and values["group_tokens"] is None:
        values["group_tokens"] = group_token_counts(values["group_ids"], values["mask"])
    return type(inputs)(**values)


def _group_tokens(inputs: PolicyInputs) -> Array:
    if inputs.group_tokens is not None:
        return inputs.group_tokens
    if inputs.group_ids is None:
        raise UserError("reduce prompt-mean needs PolicyInputs.group_ids [B, T], but it is None")
    if inputs.totals is not None:
        raise UserError(
            "reduce prompt-mean in a microbatch (totals is given) needs PolicyInputs.group_tokens [B, T]; compute it "
            "once for the whole step with jaxreason.losses.reduce.group_token_counts(group_ids, mask)"
        )
    return group_token_counts(inputs.group_ids, inputs.mask)


def _at_least_one(count: Array) -> Array:
    # A microbatch-only dummy step (all rows masked) must give 0, not 0/0.
    return jnp.maximum(count, 1.0)
