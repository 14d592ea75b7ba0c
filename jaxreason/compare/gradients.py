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

from jaxreason import config as cfg
from jaxreason import losses, rewards
from jaxreason.compare.read import number
from jaxreason.compare.runs import Planned
from jaxreason.data import chat as chats
from jaxreason.data.prompts import load_prompts
from jaxreason.errors import UserError
from jaxreason.model import unstack
from jaxreason.rewards.pool import RewardPool
from jaxreason.rollout import Engine, sampling_of
from jaxreason.sharding import check_batch, make_mesh, replicated
from jaxreason.train import advantages, minibatch, rollouts
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.collect import Collector
from jaxreason.train.run import console
from jaxreason.train.setup import Setup, open_model
from jaxreason.train.step import make_gradient, make_score, make_train_step

_SHOWN = ("ratio_min", "ratio_max", "clip_fraction", "policy_kl", "kl", "entropy")


def measure(planned: Sequence[Planned], found: Sequence[losses.Loss]) -> dict:
    """The measurement as plain values, ready for JSON.

    Args:
      planned: runs of a comparison; the first of each loss counts, and the first of all says what is rolled out.
      found: the loss of each, as ``check`` returns them.

    Returns: ``rollout`` (what was recorded), ``losses`` (labels), ``points`` with for ``start`` and ``stale`` the
    ``rows`` (value, grad_norm and metrics of each loss) and ``cosine`` [losses, losses]; None stands for undefined.

    Raises: UserError for an SFT config and for everything a user can mend.
    """
    firsts = list({item.loss: item for item in reversed(planned)}.values())[::-1]
    config = firsts[0].config
    if config.algorithm != "grpo":
        raise UserError("--offline compares policy losses on a rollout; this config's algorithm is sft")
    setup, mesh = open_model(config.model), make_mesh(config.mesh)
    model, group, seed = setup.config, config.rollout.group_size, config.run.seed
    steady = config.optimizer.model_copy(update={"schedule": "constant", "warmup_steps": 0, "warmup_fraction": 0.0})
    optimizer = opt.make(steady, 1)
    if setup.source:
        state = states.adopt(setup.source.params(model, mesh), model, optimizer, mesh)
    else:
        state = states.create(model, optimizer, mesh, seed)
    sequences = _roll_out(config, setup, state.params, mesh)
    rows = config.rollout.prompts_per_step * group
    micro = config.train.microbatch_size or minibatch.default_microbatch(rows, mesh)
    check_batch(rows, micro, mesh)
    count, temperature = rows // micro, config.rollout.temperature
    longest = max(len(s.prompt.ids) for s in sequences) + config.rollout.max_completion_tokens
    layout = rollouts.Layout(rollouts.row_length(longest), rows, count, setup.tokenizer.pad_id)
    score = jax.jit(make_score(model, count, temperature))

    # Packing follows lengths alone, so every loss's batch holds the same tokens at the same places.
    if any(item.config.kl.coef for item in firsts):
        sequences = minibatch.attach(sequences, "ref_logp", score, state.params, layout, mesh, 1)
    batches = [
        minibatch.make_inputs(
            item.config, loss, with_advantages(sequences, group, item.config, loss), score, state.params, mesh, layout, 1,
            None,
        )
        for item, loss in zip(firsts, found)
    ]  # fmt: skip
    old_logp = score(state.params, batches[0]).logp
    step = jax.jit(make_train_step(model, found[0], optimizer, opt.schedule(steady, 1), count, temperature))
    # Without old log-probs the step takes its own, and the ratio is exactly 1.
    stale = step(state, dataclasses.replace(batches[0], old_logp=None))[0].params
    points, programs = {}, [jax.jit(make_gradient(model, loss, count, temperature)) for loss in found]
    for name, params, old in (("start", state.params, None), ("stale", stale, old_logp)):
        rows_found, gradients = [], []
        for item, program, batch in zip(firsts, programs, batches):
            console.print(f"{name}: {item.loss}", markup=False)
            value, metrics, gradient, _ = jax.device_get(program(params, dataclasses.replace(batch, old_logp=old)))
            gradients.append([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(gradient)])
            shown = {key: number(float(metrics[key])) for key in _SHOWN if key in metrics}
            norm = math.sqrt(_dot(gradients[-1], gradients[-1]))
            rows_found.append({"value": number(float(value)), "grad_norm": number(norm), **shown})
        points[name] = {"rows": rows_found, "cosine": cosines(gradients)}
    stats = rollouts.metrics_of(sequences, ())
    return {
        "losses": [item.loss for item in firsts],
        "rollout": {
            "model": config.model.weights or f"random weights of {config.model.preset}, seed {seed}",
            "data": config.data.source, "seed": seed, "learning_rate": config.optimizer.learning_rate,
            "prompts": config.rollout.prompts_per_step, "group_size": group,
            "tokens": sum(len(s.completion.tokens) for s in sequences), "reward": stats["reward"],
            "zero_std_fraction": stats["zero_std_fraction"],
        },
        "points": points,
    }  # fmt: skip


def _roll_out(config: cfg.GrpoConfig, setup: Setup, params: dict, mesh) -> list[rollouts.Sequence]:
    """The first step's graded completions, as training would draw them."""
    chat = chats.resolve(setup.tokenizer, config.data.template, config.data.system_prompt)
    prompts = load_prompts(
        config.data, setup.tokenizer, config.run.seed, max_prompt_tokens=config.data.max_prompt_tokens, chat=chat
    )
    sampling = sampling_of(config.rollout)
    engine = Engine(setup.config, setup.tokenizer.stop_ids, sampling, slots=config.rollout.slots)
    weights = jax.jit(lambda p: unstack(p, setup.config), out_shardings=replicated(mesh))(params)
    graders = [(rewards.get(term.name, **term.options), term.weight) for term in config.reward.functions]
    with RewardPool(graders, config.reward.workers, config.reward.timeout_s, config.reward.on_error) as pool:
        rollout = Collector(config, engine, prompts, setup.tokenizer, chat, pool)(weights, 1, 0, 0)
    return [s for group in rollout.groups for s in group]


def with_advantages(
    sequences: Sequence[rollouts.Sequence], group: int, config: cfg.GrpoConfig, loss: losses.Loss
) -> list[rollouts.Sequence]:
    """The same completions with the advantages that belong to ``loss``; each ``group`` in a row shares a prompt."""
    groups = [list(sequences[i : i + group]) for i in range(0, len(sequences), group)]
    return [s for found in advantages.estimator(config, loss)(groups) for s in found]


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
