"""What a loss sees: per-token arrays, never a network.

Axes: B rows, T tokens. A sequence lies within one row and its positions are contiguous; a packed row holds several.
Fields are aligned: position t of every array speaks about the same target token.
"""

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import Array
from pydantic import Field

from jaxreason.errors import UserError
from jaxreason.losses.segments import Sequences, sequence_counts, sequences_of
from jaxreason.types import Totals, count_unique


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SftInputs:
    """Inputs of a supervised loss, all [B, T] float32 unless said otherwise.

    ``totals=None``: this batch is the whole optimizer step and its own counts divide.
    """

    logp: Array  # log p of the target
    mask: Array  # > 0 where the target is supervised
    entropy: Array | None = None  # entropy of the next-token distribution, nats
    logsumexp: Array | None = None  # of the logits
    mean_logp: Array | None = None  # mean over the vocabulary of log p_v
    ref_logp: Array | None = None  # log-probs of the target under the reference model
    ref_kl: Array | None = None  # KL(reference || policy) over the full vocabulary, nats
    teacher_divergence: Array | None = None  # ``Loss.divergence`` of the student's and the teacher's logits, nats
    topk_entropy: Array | None = None  # entropy of the renormalised top-k (20) probabilities, nats
    token_weights: Array | None = None  # multiplies every token's loss; the denominator stays the token count
    sequence_ids: Array | None = None  # int32, unique within the optimizer step; None: one sequence a row
    totals: Totals | None = None
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)  # further inputs, by the names that fill them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyInputs:
    """Inputs of a policy-gradient loss, all [B, T] float32 unless said otherwise.

    ``totals=None``: this batch is the whole optimizer step. The last three fields carry what a microbatch cannot know;
    only the losses that name them need them, and only when ``totals`` is given.
    """

    logp: Array  # log-probs of the parameters being trained
    old_logp: Array  # log-probs of the parameters that generated
    advantages: Array
    mask: Array  # > 0 on completion tokens
    ref_logp: Array | None = None  # log-probs of the reference model
    sampler_logp: Array | None = None  # log-probs that the sampler itself reported
    entropy: Array | None = None  # entropy of the policy's next-token distribution, nats
    sequence_ids: Array | None = None  # int32, unique within the optimizer step; None: one sequence a row
    group_ids: Array | None = None  # int32 >= 0, the prompt
    totals: Totals | None = None
    group_tokens: Array | None = None  # supervised tokens of this position's prompt in the whole step (prompt-mean)
    teacher_divergence: Array | None = None  # ``Loss.divergence`` of the policy's and the teacher's logits, nats
    selected: Array | None = None  # > 0 where the loss's step-wide rule picked the token (``Loss.select``)
    entropy_coef: Array | None = None  # replaces the option of that name (adaptive entropy bonus)
    kl_coef: Array | None = None  # replaces the option of that name, where it is not 0 (adaptive KL)
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)  # further inputs, by the names that fill them


Inputs = SftInputs | PolicyInputs
AnyInputs = TypeVar("AnyInputs", bound=Inputs)
Fraction = Annotated[float, Field(ge=0, le=1)]  # the type of an option

# Inputs that cost the caller something to produce; ``Loss.needs`` names those that a loss reads, and its extras.
OPTIONAL_INPUTS = {
    "sft": (
        "entropy", "logsumexp", "mean_logp", "ref_logp", "ref_kl", "teacher_divergence", "topk_entropy", "token_weights",
    ),
    "policy": ("ref_logp", "sampler_logp", "entropy", "group_tokens", "selected", "teacher_divergence"),
}  # fmt: skip
FIXED = frozenset({"mask", "sequence_ids", "group_ids", "totals"})  # what is no per-token value and stays as it is


def clean(inputs: AnyInputs) -> tuple[AnyInputs, Sequences]:
    """Replaces every per-token value at masked positions by 0, in float32, and locates the sequences.

    This is the inner half of the double ``where``: whatever a masked position held (1e30, NaN), every later ``exp``
    sees 0 there, so neither value nor gradient can be touched by it (inf * 0 would be NaN).
    """
    live = inputs.mask > 0
    values = dict(vars(inputs)) | {"extras": dict(inputs.extras)}
    for name, value in values.items():
        if name not in FIXED and value is not None:
            values[name] = jax.tree.map(lambda x: jnp.where(live, x.astype(jnp.float32), 0.0), value)
    return type(inputs)(**values), sequences_of(live, inputs.sequence_ids)


def totals_of(inputs: Inputs, sequences: Sequences) -> Totals:
    """The step's counts: those given, or those of this batch. Without ``group_ids`` every sequence is its own prompt; every
    run of ids counts as drawn."""
    if inputs.totals is not None:
        return inputs.totals
    tokens = jnp.sum(sequences.live, dtype=jnp.float32)
    # Each sequence with n supervised tokens adds 1/n at n positions, that is 1.
    lengths = jnp.maximum(sequence_counts(sequences), 1.0)
    count = jnp.round(jnp.sum(jnp.where(sequences.live, 1.0 / lengths, 0.0)))
    group_ids = getattr(inputs, "group_ids", None)
    prompts = count if group_ids is None else count_unique(group_ids, inputs.mask)
    rows = sequences.live.shape[0]
    drawn = rows if sequences.number is None else jnp.sum(sequences.number[:, -1] + 1, dtype=jnp.float32)
    return Totals(tokens=tokens, sequences=count, prompts=prompts, drawn=jnp.float32(drawn))


def only(inputs: AnyInputs, needs: Iterable[str]) -> AnyInputs:
    """The inputs without those optional ones, and those extras, that ``needs`` does not name."""
    kind = "sft" if isinstance(inputs, SftInputs) else "policy"
    unread: dict[str, Any] = {name: None for name in OPTIONAL_INPUTS[kind] if name not in needs}
    extras = {name: value for name, value in inputs.extras.items() if name in needs}
    return dataclasses.replace(inputs, **unread, extras=extras)


def check_shapes(inputs: Inputs) -> None:
    """Every array is [B, T], and of one shape. Runs where a loss is traced, and costs nothing where it then runs.

    Raises UserError with the shapes.
    """
    other = ("totals", "extras", "entropy_coef", "kl_coef")
    given = {name: x for name, x in vars(inputs).items() if name not in other and x is not None}
    given |= {f"extras[{name!r}]": x for name, x in inputs.extras.items()}
    arrays = list(given.values())
    try:
        chex.assert_rank(arrays, 2)
        chex.assert_equal_shape(arrays)
    except AssertionError:
        shapes = ", ".join(f"{name} {jnp.shape(x)}" for name, x in given.items())
        raise UserError(f"{type(inputs).__name__}: every array is [B, T], of one shape, but found {shapes}") from None


def need(inputs: Inputs, field: str, why: str) -> Array:
    """The field's array. Raises UserError if it is None."""
    value = getattr(inputs, field)
    if value is None:
        raise UserError(f"the loss needs {type(inputs).__name__}.{field} [B, T] ({why}), but it is None")
    return value


def need_extra(inputs: Inputs, name: str, why: str) -> Array:
    """The extra's array. Raises UserError if it is not there."""
    if name not in inputs.extras:
        raise UserError(f"the loss needs {type(inputs).__name__}.extras[{name!r}] [B, T] ({why}), but it is not there")
    return inputs.extras[name]
