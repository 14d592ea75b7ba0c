"""From graded completions to the Batch that an update trains: advantages, packing, minibatches. Host side, numpy."""

import dataclasses
import math

import numpy as np

from jaxreason.data.pack import plan
from jaxreason.data.prompts import Prompt
from jaxreason.rollout import Completion
from jaxreason.types import Batch


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One completion with what it earned."""

    prompt: Prompt
    completion: Completion
    text: str
    group: int
    rewards: dict[str, float]  # by function; NaN: no reward
    reward: float  # weighted sum; NaN: no reward
    advantage: float = 0.0

    @property
    def trained(self) -> bool:
        """A sample without a reward teaches nothing, not even as part of a total."""
        return not math.isnan(self.reward)


def row_layout(lengths: list[int], row_length: int, rows: int, microbatches: int) -> list[tuple[int, int]]:
    """(row, start) of every sequence, packed best-fit into at most ``rows`` rows of ``row_length`` tokens.

    Packed row k is put where microbatch k // m finds it (row r belongs to microbatch r mod count), so that full rows
    fill the first microbatches and the step skips the empty ones.
    """
    packed = plan(np.array(lengths), row_length, packing=True, shuffle=False, seed=0, epoch=0)
    size = rows // microbatches
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    for k in range(len(packed)):
        start = 0
        for index in packed.row(k):
            places[index] = ((k % size) * microbatches + k // size, start)
            start += lengths[index]
    return places


def make_batch(
    sequences: list[Sequence], row_length: int, rows: int, microbatches: int, pad_id: int, mask_truncated: bool
) -> Batch:
    """Sequences as packed rows [rows, row_length]; position t predicts token t + 1, the mask covers completions."""
    shape = (rows, row_length)
    ints = {n: np.zeros(shape, np.int32) for n in ("positions", "segment_ids", "sequence_ids", "group_ids")}
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    floats = {n: np.zeros(shape, np.float32) for n in ("loss_mask", "advantages", "sampler_logp", "group_tokens")}
    lengths = [len(s.prompt.ids) + len(s.completion.tokens) - 1 for s in sequences]
    segments = np.zeros(rows, np.int32)
    trained = [s.trained and not (mask_truncated and s.completion.truncated) for s in sequences]
    group_tokens: dict[int, int] = {}
    for sequence, live in zip(sequences, trained):
        group_tokens[sequence.group] = group_tokens.get(sequence.group, 0) + live * len(sequence.completion.tokens)
    for number, (sequence, (row, start)) in enumerate(
        zip(sequences, row_layout(lengths, row_length, rows, microbatches))
    ):
        ids = np.concatenate([np.asarray(sequence.prompt.ids, np.int32), sequence.completion.tokens])
        whole = slice(start, start + lengths[number])
        answer = slice(start + len(sequence.prompt.ids) - 1, start + lengths[number])
        segments[row] += 1
        tokens[row, whole], targets[row, whole] = ids[:-1], ids[1:]
        ints["positions"][row, whole], ints["segment_ids"][row, whole] = np.arange(lengths[number]), segments[row]
        ints["sequence_ids"][row, whole], ints["group_ids"][row, whole] = number + 1, sequence.group
        floats["loss_mask"][row, answer] = trained[number]
        floats["advantages"][row, answer] = sequence.advantage
        floats["sampler_logp"][row, answer] = sequence.completion.full_logp
        floats["group_tokens"][row, answer] = group_tokens[sequence.group]
    return Batch(tokens=tokens, targets=targets, **ints, **floats)


def metrics_of(sequences: list[Sequence], names: tuple[str, ...]) -> dict[str, float]:
    """What a rollout was like, in the field's names."""
    reward = np.array([s.reward for s in sequences])
    lengths = np.array([len(s.completion.tokens) for s in sequences])
    groups: dict[int, list[float]] = {}
    for s in sequences:
        groups.setdefault(s.group, []).append(s.reward)
    flat = [g for g in (np.array(g)[~np.isnan(g)] for g in groups.values()) if len(g)]
    found = {
        "reward": _mean(reward),
        "reward_std": float(np.nanstd(reward)) if not np.isnan(reward).all() else 0.0,
        "zero_std_fraction": float(np.mean([np.ptp(g) == 0 for g in flat])) if flat else 1.0,
        "no_reward_fraction": float(np.isnan(reward).mean()),
        "completion_tokens": float(lengths.mean()),
        "completion_tokens_max": float(lengths.max()),
        "truncated_fraction": float(np.mean([s.completion.truncated for s in sequences])),
    }
    for name in names:
        values = np.array([s.rewards[name] for s in sequences])
        found[f"reward_{name}"] = _mean(values)
        found[f"reward_{name}_std"] = float(np.nanstd(values)) if not np.isnan(values).all() else 0.0
    return found


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0
