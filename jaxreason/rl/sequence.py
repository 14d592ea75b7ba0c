"""A graded completion, and what a rollout was like. Host side, numpy."""

import dataclasses
import math
from collections.abc import Sequence as Many
from typing import Literal

import jax
import numpy as np

from jaxreason.data.prompts import Prompt
from jaxreason.sampler import Completion
from jaxreason.train import hosts


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One completion with what it earned; n is the number of its tokens."""

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
    # data and expert: the row's own answer, which no policy drew; in place of a group, ungraded, and as one of a group, graded
    source: Literal["policy", "data", "expert"] = "policy"
    teacher_ids: tuple[int, ...] | None = None  # a teacher's own prompt; (): it has nothing to say; None: it reads the policy's
    greedy: float | None = None  # reward of its prompt's greedy completion (NaN: no reward); None: none was drawn
    place: tuple[int, int, slice] | None = None  # in an update: its minibatch, row and columns; None: not packed yet
    extras: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # [n] float32 each, for a loss of one's own

    @property
    def tokens(self) -> np.ndarray:
        """Token ids of the completion, [n] int32."""
        return self.completion.tokens

    @property
    def trained(self) -> bool:
        """A sample without a reward teaches nothing, not even as part of a total."""
        return self.source == "data" or (self.kept and not math.isnan(self.reward))

    @property
    def drawn(self) -> bool:
        """Whether the policy drew it."""
        return self.source == "policy"

    @property
    def length(self) -> int:
        """Positions that it takes in a row: of prompt and completion, less the last token, which predicts nothing."""
        return len(self.prompt.ids) + len(self.completion.tokens) - 1

    @property
    def room(self) -> int:
        """Positions that are kept free for it: as many as the longer of the policy's and the teacher's view needs."""
        return max(len(self.prompt.ids), len(self.teacher_ids or ())) + len(self.completion.tokens) - 1


Groups = list[list[Sequence]]  # of one prompt each


def labels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of reward functions in metrics: of ``path/file.py:function`` the function, where that is unambiguous."""
    short = tuple(name.rsplit(":", 1)[-1] for name in names)
    return short if len(set(short)) == len(short) else names


def metrics_of(sequences: Many[Sequence], names: tuple[str, ...]) -> dict[str, float]:
    """What a rollout was like, in the field's names, over all processes."""
    columns = [[s.reward, len(s.completion.tokens), s.completion.truncated, *(s.rewards[n] for n in names)] for s in sequences]
    reward, lengths, truncated, *by_name = hosts.gather(np.array(columns, np.float64)).T
    offset = 1 + max(s.group for s in sequences)
    groups = hosts.gather(np.array([s.group + jax.process_index() * offset for s in sequences]))
    graded = [reward[(groups == g) & ~np.isnan(reward)] for g in np.unique(groups)]
    flat = [np.ptp(g) == 0 for g in graded if len(g)]
    found = {
        "reward": mean(reward),
        "reward_std": _std(reward),
        "zero_std_fraction": float(np.mean(flat)) if flat else 1.0,
        "no_reward_fraction": float(np.isnan(reward).mean()),
        "completion_tokens": float(lengths.mean()),
        "completion_tokens_max": float(lengths.max()),
        "truncated_fraction": float(truncated.mean()),
    }
    for name, values in zip(names, by_name):
        found[f"reward_{name}"], found[f"reward_{name}_std"] = mean(values), _std(values)
    return found


def drawn_metrics(groups: Groups) -> dict[str, float]:
    """Of all groups that a step drew, those that were not kept included, over all processes, which may differ in number."""
    rewards = [np.array([s.reward for s in group]) for group in groups]
    graded = [reward[~np.isnan(reward)] for reward in rewards]
    truncated = [s.completion.truncated for group in groups for s in group]
    sums = np.array([
        sum(float(g.sum()) for g in graded), sum(map(len, graded)),
        sum(np.ptp(g) == 0 for g in graded if len(g)), sum(len(g) > 0 for g in graded),
        sum(truncated), len(truncated),
    ], np.float64)  # fmt: skip
    reward, samples, flat, counted, cut, drawn = hosts.gather(sums[None]).sum(axis=0)
    return {
        "drawn_reward": float(reward / max(samples, 1)),
        "drawn_zero_std_fraction": float(flat / counted) if counted else 1.0,
        "drawn_truncated_fraction": float(cut / max(drawn, 1)),
    }


def mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0


def _std(values: np.ndarray) -> float:
    return float(np.nanstd(values)) if not np.isnan(values).all() else 0.0
