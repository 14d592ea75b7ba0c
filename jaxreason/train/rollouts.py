"""From graded completions to the Batch that an update trains: advantages, packing, minibatches. Host side, numpy."""

import dataclasses
import math

import jax
import numpy as np

from jaxreason.data.pack import plan
from jaxreason.data.prompts import Prompt
from jaxreason.rollout import Completion
from jaxreason.train import hosts
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
    advantage: float | np.ndarray = 0.0  # of all its tokens, or [n] of each
    ref_logp: np.ndarray | None = None  # [n] float32, log-probs of the reference model
    teacher_logp: np.ndarray | None = None  # [n] float32, log-probs of the teacher
    kept: bool = True  # false: measured, not trained

    @property
    def trained(self) -> bool:
        """A sample without a reward teaches nothing, not even as part of a total."""
        return self.kept and not math.isnan(self.reward)


def row_length(longest: int) -> int:
    """Tokens of a row that holds the longest sequence: a multiple of 64 as kernels like it, of 16 where 64 is a lot."""
    step = 64 if longest > 512 else 16
    return -(-longest // step) * step


def row_layout(lengths: list[int], row_length: int, rows: int, microbatches: int) -> list[tuple[int, int]]:
    """(row, start) of every sequence, packed in their order into at most ``rows`` rows of ``row_length`` tokens.

    As many rows as sequences always suffice. Packed row k is put where microbatch k // m finds it (row r belongs to
    microbatch r mod count), so that full rows fill the first microbatches and the step skips the empty ones.
    """
    packed = plan(np.array(lengths), row_length, packing=True, shuffle=False, seed=0, epoch=0)
    if len(packed) > rows:
        raise ValueError(f"{len(lengths)} sequences fill {len(packed)} rows of {row_length} tokens, and there are {rows}")
    size = rows // microbatches
    places: list[tuple[int, int]] = [(0, 0)] * len(lengths)
    for k in range(len(packed)):
        start = 0
        for index in packed.row(k):
            places[index] = ((k % size) * microbatches + k // size, start)
            start += lengths[index]
    return places


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the sequences of one minibatch stand in its rows."""

    row_length: int
    rows: int  # of this process
    microbatches: int
    pad_id: int

    def places(self, sequences: list[Sequence]) -> list[tuple[int, slice, slice]]:
        """(row, columns of the whole sequence, columns whose targets are the completion) of every sequence."""
        lengths = [_length(s) for s in sequences]
        found = []
        for s, n, (row, start) in zip(sequences, lengths, row_layout(lengths, self.row_length, self.rows, self.microbatches)):
            found.append((row, slice(start, start + n), slice(start + len(s.prompt.ids) - 1, start + n)))
        return found


def _length(sequence: Sequence) -> int:
    return len(sequence.prompt.ids) + len(sequence.completion.tokens) - 1


def make_batch(sequences: list[Sequence], layout: Layout, mask_truncated: bool, first: int = 0) -> Batch:
    """Sequences as packed rows [rows, row_length]; position t predicts token t + 1, the mask covers completions.

    ``first``: the number of the first sequence in the whole step, where other processes have others. The log-probs of
    the reference are there if every sequence has them.
    """
    shape, pad_id = (layout.rows, layout.row_length), layout.pad_id
    ints = {n: np.zeros(shape, np.int32) for n in ("positions", "segment_ids", "sequence_ids", "group_ids")}
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    names = ["loss_mask", "advantages", "sampler_logp", "group_tokens"]
    if sequences and all(s.ref_logp is not None for s in sequences):
        names.append("ref_logp")
    floats = {n: np.zeros(shape, np.float32) for n in names}
    segments = np.zeros(layout.rows, np.int32)
    trained = [s.trained and not (mask_truncated and s.completion.truncated) for s in sequences]
    group_tokens: dict[int, int] = {}
    for sequence, live in zip(sequences, trained):
        group_tokens[sequence.group] = group_tokens.get(sequence.group, 0) + live * len(sequence.completion.tokens)
    placed = zip(sequences, trained, layout.places(sequences))
    for number, (sequence, live, (row, whole, answer)) in enumerate(placed, first + 1):
        ids = np.concatenate([np.asarray(sequence.prompt.ids, np.int32), sequence.completion.tokens])
        segments[row] += 1
        tokens[row, whole], targets[row, whole] = ids[:-1], ids[1:]
        ints["positions"][row, whole], ints["segment_ids"][row, whole] = np.arange(_length(sequence)), segments[row]
        ints["sequence_ids"][row, whole], ints["group_ids"][row, whole] = number, sequence.group
        floats["loss_mask"][row, answer] = live
        floats["advantages"][row, answer] = sequence.advantage
        floats["sampler_logp"][row, answer] = sequence.completion.full_logp
        floats["group_tokens"][row, answer] = group_tokens[sequence.group]
        if "ref_logp" in floats:
            floats["ref_logp"][row, answer] = sequence.ref_logp
    return Batch(tokens=tokens, targets=targets, **ints, **floats)


def labels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of reward functions in metrics: of ``path/file.py:function`` the function, where that is unambiguous."""
    short = tuple(name.rsplit(":", 1)[-1] for name in names)
    return short if len(set(short)) == len(short) else names


def metrics_of(sequences: list[Sequence], names: tuple[str, ...]) -> dict[str, float]:
    """What a rollout was like, in the field's names, over all processes."""
    columns = [[s.reward, len(s.completion.tokens), s.completion.truncated, *(s.rewards[n] for n in names)] for s in sequences]
    reward, lengths, truncated, *by_name = hosts.gather(np.array(columns, np.float64)).T
    offset = 1 + max(s.group for s in sequences)
    groups = hosts.gather(np.array([s.group + jax.process_index() * offset for s in sequences]))
    graded = [reward[(groups == g) & ~np.isnan(reward)] for g in np.unique(groups)]
    flat = [np.ptp(g) == 0 for g in graded if len(g)]
    found = {
        "reward": _mean(reward),
        "reward_std": _std(reward),
        "zero_std_fraction": float(np.mean(flat)) if flat else 1.0,
        "no_reward_fraction": float(np.isnan(reward).mean()),
        "completion_tokens": float(lengths.mean()),
        "completion_tokens_max": float(lengths.max()),
        "truncated_fraction": float(truncated.mean()),
    }
    for name, values in zip(names, by_name):
        found[f"reward_{name}"], found[f"reward_{name}_std"] = _mean(values), _std(values)
    return found


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0


def _std(values: np.ndarray) -> float:
    return float(np.nanstd(values)) if not np.isnan(values).all() else 0.0
