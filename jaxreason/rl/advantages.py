"""From rewards to advantages: the estimator over groups, KL in the reward, a teacher's part by token, both turns."""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence as Many

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from jaxreason import config as cfg
from jaxreason.errors import UserError, present
from jaxreason.losses import kl, tokens
from jaxreason.rl.objective import Objective
from jaxreason.rl.sequence import Groups, Sequence, labels
from jaxreason.train import hosts

Estimated = list[list[float | np.ndarray]]  # by group and sequence: of all tokens, or [n] of each


def advantages_of(groups: Groups, second: Groups, objective: Objective, config: cfg.GrpoConfig) -> tuple[Groups, Groups]:
    """Both turns with their advantages, over all processes' groups (as many in each) together.

    ``second[i]``: the corrections of the i-th sequence of ``groups``, in order; [] without a second turn.

    With KL in the reward, a sequence's reward is R − β Σ_t k_t (RLOO, arXiv 2402.14740; k is ``kl.estimator``'s value), and
    for ``reinforce_pp`` −β k_t is the reward of every token, R is added at the last, and the reward-to-go is whitened over
    tokens (arXiv 2501.03262). With a teacher, c (log π_teacher − log π_policy) of every token is added, whomever a correction
    is compared with.
    """
    first = _first(groups, objective, config)
    corrected: Estimated = []
    if second and config.second_turn.compare == "first":
        flat = [s for group in groups for s in group]
        corrected = [
            [_finite(_total(s, config, objective) - _total(one, config, objective)) for s in group]
            for one, group in zip(flat, second)
        ]
    elif second and config.second_turn.compare == "completion":
        corrected = _estimate(second, objective, config)
    elif second:
        size = len(groups[0])
        merged = [[s for group in second[i : i + size] for s in group] for i in range(0, len(second), size)]
        rows = iter([a for row in _estimate(merged, objective, config) for a in row])
        corrected = [[next(rows) for _ in group] for group in second]
    return _with(groups, first, config), _with(second, corrected, config)


def _first(groups: Groups, objective: Objective, config: cfg.GrpoConfig) -> Estimated:
    """Of the first turn. What a row answers itself is in no estimate and gets 0, unless the estimator asks for it."""
    sources = {"policy", "expert"} if "expert_P_G" in objective.estimator.reads else {"policy"}
    judged = [[s for s in group if s.source in sources] for group in groups]
    rows = iter(_estimate([group for group in judged if group], objective, config))
    found: Estimated = []
    for group, some in zip(groups, judged):
        row = iter(next(rows) if some else [])
        found.append([next(row) if s.source in sources else 0.0 for s in group])
    return found


def _estimate(groups: Groups, objective: Objective, config: cfg.GrpoConfig) -> Estimated:
    """The estimator's advantages of ``groups``; what it fills is put into the sequences' ``extras``."""
    estimator = objective.estimator
    rewards_P_G = _table(groups, lambda s: _total(s, config, objective))
    if rewards_P_G.shape[1] == 0:  # no correction fitted
        return [[] for _ in groups]
    if estimator.by_group:
        width = max(map(len, groups), default=0)
        return estimator(_rows(groups, width, lambda s: _total(s, config, objective)), sequences_P_G=groups)[0]
    if estimator.name == "reinforce_pp":  # with KL in its token rewards, or without
        return _reinforce_pp(groups, objective, config)
    given: dict[str, object] = {"lengths_P_G": _table(groups, lambda s: len(s.completion.tokens))}
    if "rewards_F_P_G" in estimator.reads:
        names = labels(tuple(reward.name for reward, _ in objective.graders))
        given["rewards_F_P_G"] = np.stack([_table(groups, functools.partial(_reward, name)) for name in names])
        given["weights_F"] = np.array([weight for _, weight in objective.graders])
    if "expert_P_G" in estimator.reads:
        given["expert_P_G"] = _table(groups, lambda s: float(s.source == "expert")) == 1
    if "greedy_P" in estimator.reads:
        greedy = [present(group[0].greedy, "Sequence.greedy") if group else np.nan for group in groups]
        given["greedy_P"] = hosts.gather(np.array(greedy, np.float64))
    if "sequences_P_G" in estimator.reads:
        if jax.process_count() > 1:
            raise UserError(f"advantage {estimator.name} reads sequences, which other processes do not see; use one process")
        given["sequences_P_G"] = groups
    found, extras = estimator(rewards_P_G, **given)
    for name, values in extras.items():
        fill(groups, name, hosts.mine(values), f"advantage {estimator.name}")
    if isinstance(found, list):  # of an estimator of one's own: nested lists, by token or not
        return hosts.mine(found)
    return [[float(a) for a in row] for row in hosts.mine(np.asarray(found))]


def fill(groups: Groups, name: str, values: Many[Many[ArrayLike]], who: str) -> None:
    """Puts ``values`` [P][G] of [n] into the sequences' ``extras``. Raises UserError if they do not fit the completions."""
    if len(values) != len(groups) or any(len(row) < len(group) for row, group in zip(values, groups)):
        raise UserError(f"{who}: {name} is not one list for every sample of every group")
    for p, group in enumerate(groups):
        for g, s in enumerate(group):
            array = np.asarray(values[p][g], np.float32)
            if array.shape != (len(s.completion.tokens),) or not np.isfinite(array).all():
                raise UserError(
                    f"{who}: {name} of sample {g} of group {p} has shape {array.shape}; it is one finite number for each of "
                    f"the {len(s.completion.tokens)} tokens of the completion"
                )
            s.extras[name] = array


def _table(groups: Groups, value: Callable[[Sequence], float]) -> np.ndarray:
    """[P, G] over all processes; NaN, which counts in no statistic, where a group is shorter than the longest."""
    return hosts.gather(_rows(groups, hosts.largest(max(map(len, groups), default=0)), value))


def _rows(groups: Groups, width: int, value: Callable[[Sequence], float]) -> np.ndarray:
    """[P, width] of this process, NaN where a group is shorter."""
    table = np.full((len(groups), width), np.nan)
    for row, group in zip(table, groups):
        row[: len(group)] = [value(s) for s in group]
    return table


def _reward(name: str, sequence: Sequence) -> float:
    return sequence.rewards[name]


def _finite(value: float) -> float:
    return float(value) if np.isfinite(value) else 0.0


def _beta(config: cfg.GrpoConfig, objective: Objective) -> float:
    """The coefficient of a KL in the reward."""
    return config.kl.coef or 0.0 if objective.placement == "reward" else 0.0


def _penalty(sequence: Sequence, config: cfg.GrpoConfig) -> np.ndarray:
    """β-free KL of every token, [n]."""
    return kl.value(config.kl.estimator or "k1", sequence.completion.policy_logp, present(sequence.ref_logp, "Sequence.ref_logp"))


def _total(sequence: Sequence, config: cfg.GrpoConfig, objective: Objective) -> float:
    beta = _beta(config, objective)
    return sequence.reward - beta * float(np.sum(_penalty(sequence, config))) if beta else sequence.reward


def _with(groups: Groups, found: Estimated, config: cfg.GrpoConfig) -> Groups:
    """The sequences with what was found, and a teacher's part added."""
    return [
        [
            dataclasses.replace(
                s,
                advantage=value
                if s.teacher_logp is None
                else value + config.teacher.coef * (s.teacher_logp - s.completion.policy_logp),
            )
            for s, value in zip(group, row)
        ]
        for group, row in zip(groups, found)
    ]


def _reinforce_pp(groups: Groups, objective: Objective, config: cfg.GrpoConfig) -> Estimated:
    """``tokens.reinforce_pp_tokens`` over all sequences, padded to the longest."""
    flat = [s for group in groups for s in group]
    width = hosts.largest(max(len(s.completion.tokens) for s in flat))

    def table(values: Callable[[Sequence], np.ndarray | float]) -> Array:
        out = np.zeros((len(flat), width), np.float32)
        for row, s in zip(out, flat):
            row[: len(s.completion.tokens)] = values(s)
        return jnp.asarray(hosts.gather(out))

    scores, mask = table(lambda s: np.nan_to_num(s.reward)), table(lambda s: float(s.trained))
    beta = _beta(config, objective)
    penalty = table(lambda s: _penalty(s, config)) if beta else jnp.zeros_like(mask)
    options = {**objective.estimator.options, "kl_coef": beta}
    found = np.asarray(tokens.reinforce_pp_tokens(scores, penalty, jnp.zeros_like(penalty), mask, **options))  # k = old - ref
    rows = iter(hosts.mine(found))
    return [[row[: len(s.completion.tokens)] for s, row in zip(group, rows)] for group in groups]
