"""From sequences to what is on the devices: minibatches, and the log-probs that a loss compares with."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason.losses import Loss, PolicyInputs
from jaxreason.sharding import microbatch_sizes
from jaxreason.train import hosts, rollouts
from jaxreason.train.rollouts import Layout, Sequence
from jaxreason.train.setup import put
from jaxreason.types import Batch

_ROWS = 32  # of a microbatch, where the config names no number


def default_microbatch(rows: int, mesh: Mesh) -> int:
    """Rows of a microbatch where the config names no number: at most 32 and what divides the batch."""
    sizes = [size for size in microbatch_sizes(rows, mesh) if size <= _ROWS]
    return sizes[-1] if sizes else min(rows, _ROWS)


def order(seed: int, step: int, count: int, parts: int) -> np.ndarray:
    """Sequences in the order in which minibatches take them: as drawn for one, else shuffled."""
    return np.arange(count) if parts == 1 else np.random.default_rng([seed, step, parts]).permutation(count)


def attach(
    sequences: list[Sequence], field: str, score: Callable, params: dict, layout: Layout, mesh: Mesh, parts: int
) -> list[Sequence]:
    """The sequences with ``field`` set to each one's log-probs [n] under ``params``, scored as many at once as train."""
    found: list[Sequence] = []
    for part in np.array_split(np.arange(len(sequences)), parts):
        some = [sequences[i] for i in part]
        logp = hosts.rows(score(params, put(rollouts.make_batch(some, layout, False), mesh)).logp)
        found += [
            dataclasses.replace(s, **{field: logp[row, answer]}) for s, (row, _, answer) in zip(some, layout.places(some))
        ]
    return found


def make_inputs(
    config: cfg.GrpoConfig, loss: Loss, sequences: list[Sequence], score: Callable, params: dict, mesh: Mesh, layout: Layout,
    step: int, bonus: float | None,
) -> Batch:
    """The batch of one minibatch on the devices, with the log-probs that the loss compares with.

    ``score``: from :func:`jaxreason.train.step.make_score`; ``bonus``: this step's adaptive entropy coefficient.
    """
    first = jax.process_index() * layout.rows
    batch = rollouts.make_batch(sequences, layout, config.train.truncated == "mask", first)
    if bonus is not None:
        batch = dataclasses.replace(batch, entropy_coef=np.full(batch.tokens.shape, bonus, np.float32))
    batch = put(batch, mesh)
    # One update from a rollout has ratio 1 by definition, and the step itself takes its own log-probs as the old ones.
    if config.train.updates_per_rollout > 1 or loss.select:
        stats = score(params, batch)
        batch = dataclasses.replace(batch, old_logp=stats.logp)
    if loss.select is not None:
        inputs = PolicyInputs(
            stats.logp, stats.logp, batch.advantages, batch.loss_mask, entropy=stats.entropy,
            sequence_ids=batch.sequence_ids, group_ids=batch.group_ids,
        )  # fmt: skip
        key = jax.random.fold_in(jax.random.key(config.run.seed), step)
        batch = dataclasses.replace(batch, selected=loss.select(inputs, key))
    return batch
