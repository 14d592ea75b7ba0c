"""Advantage estimators by token that judge each group by itself, from its sequences: [P][G] of [n] on the host."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jax.typing import ArrayLike

from jaxreason import plugins
from jaxreason.losses.estimator import PerToken


def process(rewards_P_G: ArrayLike, sequences_P_G: Sequence[Sequence[Any]], *, ddof: int = 1, eps: float = 1e-4) -> PerToken:
    """[P][G] of [n]: at every token the sum of the normalized rewards of the steps that end there or later. Process supervision,
    DeepSeekMath (2402.03300, 4.1.3).

    A sequence's extras hold ``step_reward`` [n] and ``step_end`` [n]: at the last token of each step its reward and 1. All step
    rewards of a group are normalized together, (r - mean) / (std + eps), 0 where they are equal. With ``step_end`` 1 at every
    token these are rewards of tokens. What has no reward counts in no statistic and gets 0.
    """
    found: PerToken = []
    for rewards, group in zip(np.asarray(rewards_P_G, np.float64), sequences_P_G):
        graded = ~np.isnan(rewards)
        ends = [np.asarray(s.extras["step_end"]) > 0 if there else np.zeros(len(s.tokens), bool)
                for s, there in zip(group, graded)]  # fmt: skip
        steps = [np.asarray(s.extras["step_reward"], np.float64)[end] if there else np.zeros(0)
                 for s, end, there in zip(group, ends, graded)]  # fmt: skip
        every = np.concatenate([*steps, np.zeros(0)])
        if len(every) and np.ptp(every):
            std = np.sqrt(np.sum(np.square(every - every.mean())) / max(len(every) - ddof, 1))
            steps = [(step - every.mean()) / (std + eps) for step in steps]
        else:
            steps = [np.zeros(len(step)) for step in steps]
        row = [np.zeros(len(end)) for end in ends]
        for values, end, step in zip(row, ends, steps):
            values[end] = step
        found.append([np.cumsum(values[::-1])[::-1].astype(np.float32) for values in row])
    return found


plugins.mark(process, needs=("step_reward", "step_end"), by_group=True)


def otb(
    rewards_P_G: ArrayLike,
    sequences_P_G: Sequence[Sequence[Any]],
    *,
    eps: float = 1e-8,
    tail: Literal["zero", "baseline"] = "zero",
    singleton: Literal["zero", "raw"] = "zero",
) -> PerToken:
    """[P][G] of [n]: R - B_t, B_t = sum_i R_i W_it / (sum_i W_it + eps) over the samples of the group that have a token t. The
    optimal token baseline, as verl's ``optimal_token_baseline``.

    W_it = sum_{k <= t} (1 - 2 pi_ik + sum_v pi_v^2), which grows with the squared gradient that a sample has gathered so far;
    pi is the probability of the token under the policy that sampled, and the extra ``sum_pi_squared`` [n] is filled by the
    loop. ``tail``: where only the longest sample is left, B is 0 (``zero``) or its own reward (``baseline``, so that it learns
    nothing there). ``singleton`` as in ``advantage.grpo``.
    """
    found: PerToken = []
    for rewards, group in zip(np.asarray(rewards_P_G, np.float64), sequences_P_G):
        graded = [g for g in range(len(group)) if not np.isnan(rewards[g])]
        row = [np.zeros(len(s.tokens), np.float32) for s in group]
        energy = np.zeros((len(graded), max((len(group[g].tokens) for g in graded), default=0)))
        there = np.zeros(energy.shape, bool)
        for k, g in enumerate(graded):
            n, logp = len(group[g].tokens), np.asarray(group[g].completion.policy_logp, np.float64)
            energy[k, :n] = np.cumsum(1.0 - 2.0 * np.exp(logp) + np.asarray(group[g].extras["sum_pi_squared"], np.float64))
            there[k, :n] = True
        energy = np.where(there, energy, 0.0)
        apart = rewards[graded][:, None] - rewards[graded]  # so that equal rewards give exactly 0
        values = apart @ energy / (energy.sum(axis=0) + eps)
        if tail == "zero" and len(graded) > 1:
            values = np.where(there.sum(axis=0) == 1, rewards[graded][:, None], values)
        for k, g in enumerate(graded):
            alone = len(graded) == 1
            row[g][:] = (rewards[g] if singleton == "raw" else 0.0) if alone else values[k, : len(row[g])]
        found.append(row)
    return found


plugins.mark(otb, needs=("sum_pi_squared",), by_group=True)
