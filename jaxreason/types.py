"""The axis legend and the records that cross rooms.

Axes: B rows, T tokens, D embed, F mlp, N heads, K kv heads, H head_dim, V vocab, L layers, P prompts, G group.
"""

import dataclasses
from typing import Generic, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from typing_extensions import TypeVar

# Segments of a packed row, its padding included, for which cuDNN's attention is compiled: its softmax statistics take
# memory in proportion, 25 MB a layer for one row of 8k tokens at 32. What packs rows stays below it on every backend, so
# that a run has the same rows wherever it runs.
MAX_SEGMENTS = 32

Leaf = TypeVar("Leaf", Array, np.ndarray, jax.ShapeDtypeStruct, default=Array)

BATCH_AXES = ("data", "fsdp")  # mesh axes that the rows of a batch are split over


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherView(Generic[Leaf]):
    """The same rows as a teacher reads them: the same completions after prompts of its own, all [B, T].

    ``source[:, t]`` is the column of the teacher's row that predicts ``targets[:, t]``.
    """

    tokens: Leaf  # int32
    positions: Leaf  # int32
    segment_ids: Leaf  # int32
    source: Leaf  # int32
    taught: Leaf  # float32, 1 where the teacher has something to say


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch(Generic[Leaf]):
    """Rows of one optimizer step, or of one microbatch of it.

    Position t predicts ``targets[:, t]``, which is ``tokens[:, t + 1]`` of the same segment; every float field is
    aligned with ``targets``. Segment 0 is padding; segments of a row count from 1 and their positions from 0. Its fields are
    on devices (``Batch``), on the host (``Batch[np.ndarray]``), or shapes alone (``Batch[jax.ShapeDtypeStruct]``).
    """

    tokens: Leaf  # [B, T] int32
    targets: Leaf  # [B, T] int32
    positions: Leaf  # [B, T] int32
    segment_ids: Leaf  # [B, T] int32
    loss_mask: Leaf  # [B, T] float32, 1 where the target is trained
    sequence_ids: Leaf | None = None  # [B, T] int32, which sequence of the step; None: as segment_ids within a row
    group_ids: Leaf | None = None  # [B, T] int32, which prompt of the step
    advantages: Leaf | None = None  # [B, T] float32
    old_logp: Leaf | None = None  # [B, T] float32, log-probs at the rollout's parameters
    ref_logp: Leaf | None = None  # [B, T] float32, log-probs of the reference model
    sampler_logp: Leaf | None = None  # [B, T] float32, log-probs that the sampler itself reported
    group_tokens: Leaf | None = None  # [B, T] float32, trained tokens of the prompt in the whole step
    selected: Leaf | None = None  # [B, T] float32, what the loss's step-wide rule picked
    token_weights: Leaf | None = None  # [B, T] float32, weight of the target in a supervised loss
    entropy_coef: Leaf | None = None  # [B, T] float32, this step's coefficient of an adaptive entropy bonus
    kl_coef: Leaf | None = None  # [B, T] float32, this step's coefficient of an adaptive KL
    teacher: TeacherView[Leaf] | None = None  # None: a teacher reads what the model reads
    extras: dict[str, Leaf] = dataclasses.field(default_factory=dict)  # [B, T] float32 each, what a loss of one's own reads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Counts over the whole optimizer step: all microbatches and all devices.

    Every loss is a sum divided by one of these, so that neither microbatching nor sharding can change it.
    """

    tokens: Array  # [] float32, supervised tokens, at least 1
    sequences: Array  # [] float32, sequences with at least one supervised token
    prompts: Array  # [] float32, prompts (groups) with at least one supervised token
    drawn: Array | None = None  # [] float32, sequences, those without a supervised token included


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and changes. Randomness is a function of the seed and ``step``, so nothing else is needed.

    The model's parameters are ``params``, which the optimizer changes, together with ``frozen``, which it never sees; no leaf
    is in both, and ``frozen`` is empty where everything trains.
    """

    step: Array  # [] int32, optimizer updates done
    params: dict
    frozen: dict
    opt_state: tuple

    @property
    def model_params(self) -> dict:
        """All parameters of the model, as ``jaxreason.model`` takes them."""
        return merge(self.params, self.frozen)


def merge(a: dict, b: dict) -> dict:
    """Two nested dicts, or dicts of equally long lists of them, without a common leaf as one."""
    both = {}
    for key in a.keys() & b.keys():
        x, y = a[key], b[key]
        both[key] = [merge(*pair) for pair in zip(x, y, strict=True)] if isinstance(x, list) else merge(x, y)
    return {key: both.get(key, a.get(key, b.get(key))) for key in [*a, *(key for key in b if key not in a)]}


def count_unique(ids: Array, mask: Array) -> Array:
    """Number of different values of ``ids`` [...] among positions where ``mask`` > 0, as a float32 scalar."""
    live = jnp.where(mask > 0, ids, -1).reshape(-1)
    ordered = jnp.sort(live)
    first = jnp.concatenate([jnp.ones((1,), bool), ordered[1:] != ordered[:-1]])
    return jnp.sum(first & (ordered >= 0)).astype(jnp.float32)


@overload
def combine_metrics(name: str, a: Array, b: Array) -> Array: ...
@overload
def combine_metrics(name: str, a: float, b: float) -> Array | float: ...
def combine_metrics(name: str, a: Array | float, b: Array | float) -> Array | float:
    """One metric of two parts of a step, put together: ``*_max`` and ``*_min`` by that, everything else adds."""
    if name.endswith("_max"):
        return jnp.maximum(a, b)
    return jnp.minimum(a, b) if name.endswith("_min") else a + b


def empty_metrics(shapes: dict) -> dict[str, Array]:
    """The neutral element of :func:`combine_metrics` for every metric."""
    start = {"_max": -jnp.inf, "_min": jnp.inf}
    return {name: jnp.full(s.shape, start.get(name[-4:], 0.0), s.dtype) for name, s in shapes.items()}
