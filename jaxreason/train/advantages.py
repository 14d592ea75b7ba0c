"""From rewards to advantages: the estimator over groups, KL in the reward, and a teacher's part by token."""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Many

import numpy as np

from jaxreason import config as cfg
from jaxreason import losses
from jaxreason.errors import UserError
from jaxreason.losses import advantage, tokens
from jaxreason.train import hosts
from jaxreason.train.rollouts import Sequence, labels

Groups = list[list[Sequence]]
Estimator = Callable[[Groups], Groups]


def placement(config: cfg.GrpoConfig, loss: losses.Loss) -> str:
    """Where the KL is: ``loss`` or ``reward``."""
    return config.kl.placement or loss.kl_placement


def estimator(config: cfg.GrpoConfig, loss: losses.Loss) -> Estimator:
    """A function that fills in the advantages of groups, over all processes' groups (as many in each) together.

    With KL in the reward, a sequence's reward is R − β Σ_t k1_t (RLOO, arXiv 2402.14740), and for ``reinforce_pp``
    −β k1_t stands at every token, R at the last, and the reward-to-go is whitened over tokens (arXiv 2501.03262).
    With a teacher, c (log π_teacher − log π_sampler) of every token is added. Raises UserError where two choices
    exclude each other.
    """
    name = config.advantage.name or loss.advantage or "grpo"
    function = advantage.get(name, preset=loss.advantage_preset, **config.advantage.options)
    takes = function.reads
    weights = np.array([term.weight for term in config.reward.functions])
    names = labels(tuple(term.name for term in config.reward.functions))
    beta = config.kl.coef if placement(config, loss) == "reward" else 0.0
    if beta and "weights_F" in takes:
        raise UserError(f"kl.placement=reward: advantage {name} reads each reward by itself; use kl.placement=loss")
    by_token = beta and name == "reinforce_pp"

    def estimate(groups: Groups) -> Groups:
        if by_token:
            found = _reinforce_pp(groups, beta, config.advantage.options)
        else:
            totals_P_G = _table(groups, lambda s: _total(s, beta))
            if "weights_F" in takes:
                by_name = [_table(groups, lambda s, n=name: s.rewards[n]) for name in names]
                advantages = function(totals_P_G, rewards_F_P_G=np.stack(by_name), weights_F=weights)[0]
            elif "lengths_P_G" in takes:
                advantages = function(totals_P_G, lengths_P_G=_table(groups, lambda s: len(s.completion.tokens)))[0]
            else:
                advantages = function(totals_P_G)[0]
            found = [[float(a) for a in row] for row in hosts.mine(np.asarray(advantages))]
        return [[_with(s, a, config.teacher.coef) for s, a in zip(g, row)] for g, row in zip(groups, found)]

    return estimate


def teach(
    sequences: list[Sequence], groups: Groups, second: Groups, estimate: Estimator, config: cfg.GrpoConfig
) -> list[Sequence]:
    """The sequences of both layers, which stand in the order of ``groups`` and ``second``, with their advantages."""
    shape = iter(sequences)
    first = estimate([[next(shape) for _ in group] for group in groups])
    flat = [s for group in first for s in group]
    corrections = [[next(shape) for _ in group] for group in second]
    if second and config.correction.compare == "first":
        corrections = against_first(corrections, flat)
    elif second:
        size = len(first[0]) if config.correction.compare == "prompt" else 1
        merged = [[s for group in corrections[i : i + size] for s in group] for i in range(0, len(corrections), size)]
        corrections = estimate(merged)
    return flat + [s for group in corrections for s in group]


def against_first(groups: Groups, firsts: Many[Sequence], beta: float = 0.0) -> Groups:
    """Advantage = reward − the reward of the completion that was corrected; ``firsts[i]`` belongs to ``groups[i]``."""
    return [
        [dataclasses.replace(s, advantage=_finite(_total(s, beta) - first.reward)) for s in group]
        for group, first in zip(groups, firsts)
    ]


def _table(groups: Groups, value: Callable[[Sequence], float]) -> np.ndarray:
    """[P, G] over all processes; NaN, which counts in no statistic, where a group is shorter than the longest."""
    table = np.full((len(groups), hosts.largest(max(map(len, groups)))), np.nan)
    for row, group in zip(table, groups):
        row[: len(group)] = [value(s) for s in group]
    return hosts.gather(table)


def _finite(value: float) -> float:
    return float(value) if np.isfinite(value) else 0.0


def _total(sequence: Sequence, beta: float) -> float:
    if not beta:
        return sequence.reward
    return sequence.reward - beta * float(np.sum(sequence.completion.full_logp - sequence.ref_logp))


def _with(sequence: Sequence, value: float | np.ndarray, coef: float) -> Sequence:
    if sequence.teacher_logp is not None:
        value = value + coef * (sequence.teacher_logp - sequence.completion.full_logp)
    return dataclasses.replace(sequence, advantage=value)


def _reinforce_pp(groups: Groups, beta: float, options: dict) -> list[list[np.ndarray]]:
    """``tokens.reinforce_pp_tokens`` over all sequences, padded to the longest."""
    flat = [s for group in groups for s in group]
    width = hosts.largest(max(len(s.completion.tokens) for s in flat))

    def table(values: Callable[[Sequence], np.ndarray | float]) -> np.ndarray:
        out = np.zeros((len(flat), width), np.float32)
        for row, s in zip(out, flat):
            row[: len(s.completion.tokens)] = values(s)
        return hosts.gather(out)

    scores, mask = table(lambda s: np.nan_to_num(s.reward)), table(lambda s: float(s.trained))
    old, ref = table(lambda s: s.completion.full_logp), table(lambda s: s.ref_logp)
    found = np.asarray(tokens.reinforce_pp_tokens(scores, old, ref, mask, kl_coef=beta, **options))
    rows = iter(hosts.mine(found))
    return [[row[: len(s.completion.tokens)] for s, row in zip(group, rows)] for group in groups]
