"""Losses side by side on one recorded rollout: value, gradient norm, and the angle between their gradients.

Nothing is trained. One rollout of the config's first step is graded and kept; each loss then sees the same tokens with
its own advantages, at two policies:

- ``start``: the policy that sampled, where every ratio is 1 and clipping cannot act;
- ``stale``: that policy after one optimizer step of the first loss at the full learning rate, where it can.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason import losses
from jaxreason import sampler as samplers
from jaxreason.compare.options import effective
from jaxreason.compare.probe import weight_curve
from jaxreason.compare.read import FORMAT
from jaxreason.compare.runs import Entry
from jaxreason.data.prompts import PromptStream
from jaxreason.errors import UserError, present
from jaxreason.model import ModelConfig
from jaxreason.model.vocab import HeadStats
from jaxreason.report.read import number
from jaxreason.rewards.pool import RewardPool
from jaxreason.rl.adaptive import Adaptive
from jaxreason.rl.batch import Batcher, selected
from jaxreason.rl.collect import Collector, Rollout
from jaxreason.rl.grpo import (
    Inputs,
    compared_with,
    compile_score,
    compile_squares,
    distilled_from,
    follow_base,
    open_inputs,
    scoring_models,
    with_slots,
)
from jaxreason.rl.objective import Objective
from jaxreason.rl.sequence import metrics_of
from jaxreason.rl.shapes import EXPERT, SAMPLED, Shapes, keeps_reference, shapes_of
from jaxreason.sharding import make_mesh, within
from jaxreason.terminal import console
from jaxreason.train import hosts
from jaxreason.train import optimizer as opt
from jaxreason.train.scoring import ScoringModel
from jaxreason.train.setup import start_state
from jaxreason.train.step import make_gradient, policy_inputs, totals_of
from jaxreason.types import Batch, TrainState

_SHOWN = ("ratio_min", "ratio_max", "clip_fraction", "policy_kl", "kl", "entropy")
_READ = frozenset({"ref_logp", "sampler_logp", "entropy", "group_tokens", "selected"})
_DOTS = 200  # tokens of each sign of advantage in a figure
PULL = ("pull_logp", "pull_entropy")  # extras of the one loss that is differentiated by the parameters


@dataclasses.dataclass(frozen=True)
class _Member:
    """One loss of the comparison."""

    loss: str  # as the user wrote it
    config: cfg.GrpoConfig
    objective: Objective


def measure(entries: Sequence[Entry], objectives: Sequence[Objective | None]) -> dict:
    """The measurement as plain values, ready for JSON.

    A policy loss sees the network through log-probs and entropies alone. Its gradient is therefore the network's pullback of
    ∂L/∂logp and ∂L/∂entropy [B, T]: one program of the network serves every loss, and those per-token weights are kept.

    Args:
      entries: runs of a comparison; the first of each loss counts, and the first of all says what is rolled out.
      objectives: of each loss, as ``check`` returns them; None for a supervised loss.

    Returns: ``rollout`` (what was recorded), ``losses`` (labels), ``points`` with for ``start`` and ``stale`` the
    ``rows`` (value, grad_norm and metrics of each loss) and ``cosine`` [losses, losses], None standing for undefined;
    ``curve`` (:func:`jaxreason.compare.probe.weight_curve` of each loss) and ``tokens``, for each loss and each sign of the
    advantage some [log-ratio, weight] measured at ``stale``.

    Raises: UserError for an SFT config and for everything that a user can fix.
    """
    members = _members(entries, objectives)
    config = members[0].config
    inputs, mesh = open_inputs(config), make_mesh(config.mesh)
    # The learning rate that training ends its warm-up with, from the first step on.
    steady = config.optimizer.model_copy(update={"schedule": "constant", "warmup_steps": 0, "warmup_fraction": 0.0})
    optimizer = opt.make(steady, 1)
    state = start_state(config, inputs.setup, optimizer, mesh)
    shapes = _shapes(members[0], inputs, mesh)
    console.print("rollout", markup=False)
    greedy = any(member.objective.greedy for member in members)
    rollout = _roll_out(with_slots(config, inputs, shapes, state, mesh), inputs, state, mesh, greedy)
    score = compile_score(inputs.setup.config, shapes, config.rollout.temperature, mesh)
    others = _others(members, inputs, score, shapes, mesh)
    follow_base(inputs.setup.config, others, state)
    batches = _batches(members, inputs, rollout, score, others, state, mesh)
    programs = _programs(members, inputs, shapes, others, mesh)
    points: dict[str, Any] = {}
    old: Array | None = None
    tokens: list[dict] = []
    scales: list[float | None] = []
    for name in ("start", "stale"):
        stats = score(state.model_params, batches[0])
        old = stats.logp if old is None else old
        rows, gradients = [], []
        for member, program, batch in zip(members, programs, batches):
            console.print(f"{name}: {member.loss}", markup=False)
            batch = dataclasses.replace(batch, old_logp=old)
            if (loss := member.objective.loss).reselects:
                picked = selected(present(loss.select, "Loss.select"), stats, batch, config.run.seed, 1)
                batch = dataclasses.replace(batch, selected=picked)
            value, metrics, gradient, by_logp = program(state, stats, batch)
            gradients.append([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(jax.device_get(gradient))])
            if name == "start":
                scales.append(_scale(batch, by_logp))
            else:
                tokens.append(_tokens(batch, stats.logp, by_logp, scales[len(tokens)]))
            if name == "start" and len(gradients) == 1:
                stale = dataclasses.replace(state, params=_moved(state, gradient, optimizer, config.run.seed))
            shown = {key: number(float(metrics[key])) for key in _SHOWN if key in metrics}
            norm = math.sqrt(_dot(gradients[-1], gradients[-1]))
            rows.append({"value": number(float(value)), "grad_norm": number(norm), **shown})
        points[name] = {"rows": rows, "cosine": cosines(gradients)}
        state = stale
    return {
        "format": FORMAT,
        "losses": [member.loss for member in members],
        "options": [effective(member.config) for member in members],
        "rollout": _described(config, rollout),
        "points": points,
        "curve": [weight_curve(m.objective.loss, _means(m.objective.loss, b)) for m, b in zip(members, batches)],
        "tokens": tokens,
    }


def _members(entries: Sequence[Entry], objectives: Sequence[Objective | None]) -> list[_Member]:
    """One for each loss. Raises UserError for what a rollout says nothing about."""
    firsts = list({item.loss: item for item in reversed(entries)}.values())[::-1]
    members = [
        _Member(item.loss, _whole(item.config), objective)
        for item, objective in zip(firsts, objectives)
        if isinstance(item.config, cfg.GrpoConfig) and objective is not None
    ]
    if len(members) < len(firsts):
        raise UserError("--offline compares policy losses on a rollout; this config's algorithm is sft")
    return members


def _shapes(member: _Member, inputs: Inputs, mesh: Mesh) -> Shapes:
    loss, longest = member.objective.loss, inputs.longest_prompt
    return shapes_of(member.config, loss, longest, mesh, context_tokens=inputs.context_tokens)


def _described(config: cfg.GrpoConfig, rollout: Rollout) -> dict:
    """What was rolled out."""
    stats, settings = metrics_of(rollout.sequences, ()), config.rollout
    return {
        "model": config.model.weights or f"random weights of {config.model.preset}, seed {config.run.seed}",
        "data": config.data.source, "seed": config.run.seed, "learning_rate": config.optimizer.learning_rate,
        "prompts": settings.prompts_per_step, "group_size": settings.group_size,
        "corrections": config.second_turn.samples, "teacher": config.teacher.weights,
        "tokens": sum(len(s.completion.tokens) for s in rollout.sequences), "reward": stats["reward"],
        "zero_std_fraction": stats["zero_std_fraction"],
    }  # fmt: skip


# ---- gradients


def _programs(
    members: Sequence[_Member], inputs: Inputs, shapes: Shapes, others: dict[str, ScoringModel], mesh: Mesh
) -> list[Callable]:
    """For each loss ``(state, stats, batch) -> (value, metrics, gradient, ∂L/∂logp)``.

    A loss that reads more of the network than log-probs and entropies (the divergence from a teacher) is differentiated
    through the network by a program of its own, and its ∂L/∂logp is None.
    """
    config, model = members[0].config, inputs.setup.config
    count, temperature = shapes.microbatches, config.rollout.temperature
    found = [member.objective.loss for member in members]
    pull = within(mesh, jax.jit(pullback(model, found, count, temperature)))
    teacher = distilled_from(config, inputs, mesh, others)

    def pulled(loss: losses.Loss) -> Callable:
        weigh = within(mesh, jax.jit(value_of(loss)))

        def program(state: TrainState, stats: HeadStats, batch: Batch) -> tuple:
            value, metrics, by_input = weigh(stats, batch)
            return value, metrics, pull(state.params, _plain(batch, by_input), None, 0, state.frozen)[2], by_input[0]

        return program

    def whole(loss: losses.Loss) -> Callable:
        direct = within(mesh, jax.jit(make_gradient(model, loss, count, temperature, compared_with(config, inputs))))

        def program(state: TrainState, stats: HeadStats, batch: Batch) -> tuple:
            second = teacher.params() if teacher else None
            return (*direct(state.params, batch, second, 0, state.frozen)[:3], None)

        return program

    return [pulled(loss) if loss.needs - loss.extras <= _READ else whole(loss) for loss in found]


def value_of(loss: losses.Loss) -> Callable:
    """``(stats, batch) -> (value, metrics, (∂L/∂logp, ∂L/∂entropy) [B, T])`` of a whole step."""

    def weigh(stats: HeadStats, batch: Batch) -> tuple[Array, dict[str, Array], tuple[Array, Array]]:
        def at(logp: Array, entropy: Array) -> tuple[Array, dict[str, Array]]:
            return loss(policy_inputs(dataclasses.replace(stats, logp=logp, entropy=entropy), batch, totals_of(batch)))

        (value, metrics), found = jax.value_and_grad(at, argnums=(0, 1), has_aux=True)(stats.logp, stats.entropy)
        return value, metrics, found

    return weigh


def pullback(config: ModelConfig, found: Sequence[losses.Loss], count: int, temperature: float) -> Callable:
    """The gradient program (:func:`make_gradient`) of Σ (c · logp + e · entropy), c and e being the batch's extras ``PULL``.

    The entropy is differentiated where one of the losses ``found`` reads it.
    """
    needs = {*PULL, "entropy"} if any("entropy" in loss.needs for loss in found) else {*PULL}

    def linear(inputs: losses.PolicyInputs) -> tuple[Array, dict[str, Array]]:
        logp, entropy = (inputs.extras[name] for name in PULL)
        value = jnp.sum(logp * inputs.logp)
        return (value + jnp.sum(entropy * present(inputs.entropy, "the entropy")) if "entropy" in needs else value), {}

    loss = losses.Loss("pullback", {}, "policy", False, frozenset(needs), linear)
    return make_gradient(config, loss, count, temperature)


def _plain(batch: Batch, by_input: tuple[Array, Array]) -> Batch:
    """What :func:`pullback` reads: of one structure for every loss, so that the network's program is compiled once."""
    return dataclasses.replace(
        batch, old_logp=None, ref_logp=None, sampler_logp=None, group_tokens=None, selected=None, entropy_coef=None,
        kl_coef=None, teacher=None, extras=dict(zip(PULL, by_input)),
    )  # fmt: skip


def _moved(state: TrainState, gradient: dict, optimizer: optax.GradientTransformation, seed: int) -> dict:
    """The parameters after one optimizer step."""

    def moved(params: dict, gradient: dict, opt_state: tuple) -> dict:
        updates, _ = optimizer.update(gradient, opt_state, params)
        return opt.apply(params, updates, state.step, seed)

    return jax.jit(moved)(state.params, gradient, state.opt_state)


# ---- per-token weights


def _scale(batch: Batch, by_logp: Array | None) -> float | None:
    """What the weights of a loss are divided by: the median at ratio 1 of |∂L/∂logp| / |A|, tokens without advantage or weight
    left out; None where there are no others."""
    if by_logp is None:
        return None
    advantages, found = (hosts.rows(x) for x in (present(batch.advantages, "Batch.advantages"), by_logp))
    live = (hosts.rows(batch.loss_mask) > 0) & (advantages != 0)
    sizes = np.abs(found[live]) / np.abs(advantages[live])
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return float(np.median(sizes)) if len(sizes) else None


def _tokens(batch: Batch, logp: Array, by_logp: Array | None, scale: float | None) -> dict[str, list[list[float]]]:
    """[log-ratio, −∂L/∂logp / (|A| · scale)] of some tokens of either sign of A, evenly over the order of log-ratios; none
    where there is no scale."""
    if by_logp is None or scale is None:
        return {"positive": [], "negative": []}
    fields = (batch.loss_mask, present(batch.advantages, "Batch.advantages"), present(batch.old_logp, "Batch.old_logp"))
    mask, advantages, old, new, found = (hosts.rows(x) for x in (*fields, logp, by_logp))
    chosen = {}
    for name, live in {"positive": (mask > 0) & (advantages > 0), "negative": (mask > 0) & (advantages < 0)}.items():
        ratio, weight = (new - old)[live], -found[live] / (np.abs(advantages[live]) * scale)
        order = np.argsort(ratio, kind="stable")
        at = order[np.unique(np.linspace(0, max(0, len(order) - 1), min(_DOTS, len(order))).round().astype(int))]
        chosen[name] = [[float(f"{r:.4g}"), float(f"{w:.4g}")] for r, w in zip(ratio[at], weight[at]) if np.isfinite(w)]
    return chosen


def _means(loss: losses.Loss, batch: Batch) -> dict[str, float]:
    """The mean over trained tokens of every extra that the loss reads; the token that is asked about is the policy's own."""
    live = hosts.rows(batch.loss_mask) > 0
    known = {EXPERT: 0.0, SAMPLED: 1.0}
    return {name: known.get(name, float(hosts.rows(batch.extras[name])[live].mean())) for name in loss.extras}


# ---- the rollout


def _roll_out(config: cfg.GrpoConfig, inputs: Inputs, state: TrainState, mesh: Mesh, greedy: bool) -> Rollout:
    """The first step's graded completions of both turns, as training would draw them."""
    sampler = samplers.make(config.rollout.sampler, inputs.setup.config, inputs.setup.tokenizer.stop_ids, mesh)
    sampler.load(state.model_params, 0)
    stream = PromptStream(inputs.prompts, config.run.seed, config.data.shuffle)
    settings, graders = config.reward, inputs.objective.graders
    with RewardPool(graders, settings.workers, settings.timeout_s, settings.on_error) as pool:
        collect = Collector(config, sampler, stream, inputs.setup.tokenizer, inputs.chat, pool, inputs.longest_prompt, greedy)
        rollout = collect(1, 0, 0)
    sampler.release()
    return rollout


def _whole(config: cfg.GrpoConfig) -> cfg.GrpoConfig:
    """The config with its rollout in one update: a comparison is of one gradient over all of it."""
    return config.model_copy(update={"train": config.train.model_copy(update={"minibatches": 1, "updates_per_rollout": 1})})


def _others(
    members: Sequence[_Member], inputs: Inputs, score: Callable, shapes: Shapes, mesh: Mesh
) -> dict[str, ScoringModel]:
    """What else scores the rollout, for all losses: a reference if one of them has it. Each scores once."""
    keeper = next((m for m in members if keeps_reference(m.config, m.objective.loss)), members[0])
    others = scoring_models(keeper.config, dataclasses.replace(inputs, objective=keeper.objective), score, shapes, mesh)
    for model in others.values():
        model.score = _once(model.score)
    return others


def _batches(
    members: Sequence[_Member], inputs: Inputs, rollout: Rollout, score: Callable, others: dict[str, ScoringModel],
    state: TrainState, mesh: Mesh,
) -> list[Batch]:  # fmt: skip
    """The rollout as the batch that training with each loss would make of it, all of it in one update.

    Packing follows lengths alone, so every loss's batch holds the same tokens at the same places.
    """
    found, pad_id, model = [], inputs.setup.tokenizer.pad_id, inputs.setup.config
    for m in members:
        shapes, squares = _shapes(m, inputs, mesh), None
        if m.objective.squares:
            squares = compile_squares(model, shapes, m.config.rollout.temperature, mesh)
        batcher = Batcher(m.config, m.objective, shapes, mesh, pad_id, score, others, inputs.teacher_prompts, squares)
        _, (batch,) = batcher(rollout.groups, rollout.second, state.model_params, 1, Adaptive(m.config).now)
        found.append(batch)
    return found


def _once(score: Callable) -> Callable:
    """``score``, which computes what it returns the first time only."""
    found: list[HeadStats] = []

    def scored(params: dict, batch: Batch) -> HeadStats:
        if not found:
            found.append(score(params, batch))
        return found[0]

    return scored


def cosines(gradients: Sequence[Sequence[np.ndarray]]) -> list[list[float | None]]:
    """cos(gᵢ, gⱼ) of gradients given leaf by leaf; None beside a zero or non-finite gradient."""
    norms = [math.sqrt(_dot(g, g)) for g in gradients]
    table: list[list[float | None]] = [[None] * len(norms) for _ in norms]
    for i, a in enumerate(gradients):
        for j, b in enumerate(gradients[: i + 1]):
            scale = norms[i] * norms[j]
            if scale > 0 and math.isfinite(scale):
                table[i][j] = table[j][i] = max(-1.0, min(1.0, _dot(a, b) / scale))
    return table


def _dot(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    # Leaf by leaf in float64: a float32 sum over millions of squares loses the digits that tell two losses apart.
    return float(sum(np.vdot(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b)))
