"""Losses side by side on one recorded rollout: value, gradient norm, and the angle between their gradients.

Nothing is trained. One rollout of the config's first step is graded and kept; each loss then sees the same tokens with
its own advantages, at two policies:

- ``start``: the policy that sampled, where every ratio is 1 and clipping cannot act;
- ``stale``: that policy after one optimizer step of the first loss at the full learning rate, where it can.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason import losses
from jaxreason import sampler as samplers
from jaxreason.compare.read import number
from jaxreason.compare.runs import Entry
from jaxreason.data.prompts import PromptStream
from jaxreason.errors import UserError, present
from jaxreason.rewards.pool import RewardPool
from jaxreason.rl.adaptive import Adaptive
from jaxreason.rl.batch import Batcher, selected
from jaxreason.rl.collect import Collector, Rollout
from jaxreason.rl.grpo import Inputs, compile_score, compile_squares, open_inputs, scoring_models, with_slots
from jaxreason.rl.objective import objective_of
from jaxreason.rl.sequence import metrics_of
from jaxreason.rl.shapes import shapes_of
from jaxreason.sharding import make_mesh
from jaxreason.terminal import console
from jaxreason.train import optimizer as opt
from jaxreason.train.setup import start_state
from jaxreason.train.step import make_gradient, make_train_step
from jaxreason.types import Batch, TrainState

_SHOWN = ("ratio_min", "ratio_max", "clip_fraction", "policy_kl", "kl", "entropy")


def measure(entries: Sequence[Entry], found: Sequence[losses.Loss]) -> dict:
    """The measurement as plain values, ready for JSON.

    Args:
      entries: runs of a comparison; the first of each loss counts, and the first of all says what is rolled out.
      found: the loss of each, as ``check`` returns them.

    Returns: ``rollout`` (what was recorded), ``losses`` (labels), ``points`` with for ``start`` and ``stale`` the
    ``rows`` (value, grad_norm and metrics of each loss) and ``cosine`` [losses, losses]; None stands for undefined.

    Raises: UserError for an SFT config and for everything that a user can fix.
    """
    firsts = list({item.loss: item for item in reversed(entries)}.values())[::-1]
    configs = [item.config for item in firsts if isinstance(item.config, cfg.GrpoConfig)]
    if len(configs) < len(firsts):
        raise UserError("--offline compares policy losses on a rollout; this config's algorithm is sft")
    config = _whole(configs[0])
    inputs, mesh = open_inputs(config), make_mesh(config.mesh)
    model, temperature = inputs.setup.config, config.rollout.temperature
    # The learning rate that training ends its warm-up with, from the first step on.
    steady = config.optimizer.model_copy(update={"schedule": "constant", "warmup_steps": 0, "warmup_fraction": 0.0})
    optimizer = opt.make(steady, 1)
    state = start_state(config, inputs.setup, optimizer, mesh)
    shapes = shapes_of(config, found[0], inputs.longest_prompt, mesh)
    greedy = any(objective_of(own).greedy for own in configs)
    rollout = _roll_out(with_slots(config, inputs, shapes, state, mesh), inputs, state, mesh, greedy)
    batches = [_batch(own, inputs, rollout, state, mesh) for own in configs]
    count = shapes.microbatches
    score = compile_score(model, shapes, temperature, mesh)
    old_logp = score(state.model_params, batches[0]).logp
    step = jax.jit(make_train_step(model, found[0], optimizer, opt.schedule(steady, 1), count, temperature))
    # Without old log-probs the step takes its own, and the ratio is exactly 1.
    stale = step(state, dataclasses.replace(batches[0], old_logp=None))[0].params
    points, programs = {}, [jax.jit(make_gradient(model, loss, count, temperature)) for loss in found]
    for name, params, old in (("start", state.params, None), ("stale", stale, old_logp)):
        rows_found, gradients = [], []
        for item, loss, program, batch in zip(firsts, found, programs, batches):
            console.print(f"{name}: {item.loss}", markup=False)
            if loss.reselects:
                picked = selected(present(loss.select, "Loss.select"), score(params, batch), batch, config.run.seed, 1)
                batch = dataclasses.replace(batch, selected=picked)
            batch = dataclasses.replace(batch, old_logp=old)
            value, metrics, gradient, _ = jax.device_get(program(params, batch, None, 0, state.frozen))
            gradients.append([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(gradient)])
            shown = {key: number(float(metrics[key])) for key in _SHOWN if key in metrics}
            norm = math.sqrt(_dot(gradients[-1], gradients[-1]))
            rows_found.append({"value": number(float(value)), "grad_norm": number(norm), **shown})
        points[name] = {"rows": rows_found, "cosine": cosines(gradients)}
    stats = metrics_of(rollout.sequences, ())
    return {
        "losses": [item.loss for item in firsts],
        "rollout": {
            "model": config.model.weights or f"random weights of {config.model.preset}, seed {config.run.seed}",
            "data": config.data.source, "seed": config.run.seed, "learning_rate": config.optimizer.learning_rate,
            "prompts": config.rollout.prompts_per_step, "group_size": config.rollout.group_size,
            "tokens": sum(len(s.completion.tokens) for s in rollout.sequences), "reward": stats["reward"],
            "zero_std_fraction": stats["zero_std_fraction"],
        },
        "points": points,
    }  # fmt: skip


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
    """The config with its rollout in one minibatch: a comparison is of one update over all of it."""
    return config.model_copy(update={"train": config.train.model_copy(update={"minibatches": 1})})


def _batch(config: cfg.GrpoConfig, inputs: Inputs, rollout: Rollout, state: TrainState, mesh: Mesh) -> Batch:
    """The rollout as the batch that training with ``config`` would make of it, all of it in one update.

    Packing follows lengths alone, so every loss's batch holds the same tokens at the same places.
    """
    config = _whole(config)
    objective = objective_of(config)
    shapes = shapes_of(config, objective.loss, inputs.longest_prompt, mesh)
    score = compile_score(inputs.setup.config, shapes, config.rollout.temperature, mesh)
    others = scoring_models(config, dataclasses.replace(inputs, objective=objective), score, shapes, mesh)
    squares = compile_squares(inputs.setup.config, shapes, config.rollout.temperature, mesh) if objective.squares else None
    batcher = Batcher(config, objective, shapes, mesh, inputs.setup.tokenizer.pad_id, score, others, squares)
    _, (batch,) = batcher(rollout.groups, rollout.second, state.model_params, 1, Adaptive(config).now)
    return batch


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
