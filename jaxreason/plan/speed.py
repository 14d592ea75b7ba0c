"""How fast a config's run is predicted to be, and what that costs: seconds of its compiled programs, put together."""

import math
from typing import Any

from jaxreason import config as cfg
from jaxreason.errors import present
from jaxreason.model.flops import train_flops_per_token, weight_flops_per_token
from jaxreason.plan import hlo, roofline, timing
from jaxreason.plan import phases as phases_of
from jaxreason.plan.compile import Program
from jaxreason.plan.options import Options
from jaxreason.plan.programs import Programs, Shape
from jaxreason.plan.timing import Documents
from jaxreason.rl.shapes import minibatches_scored
from jaxreason.sharding import device_bytes

_SCORED = ("reference", "teacher", "old log-probs")  # forward passes over rows of a rollout


def record(s: Shape, run: Programs, made: dict[str, Program], options: Options, backend: str) -> dict[str, Any]:
    """Step, decoding, phases of a rollout and the whole recipe; seconds are those of ``timing.costs``.

    ``backend``: what computes attention, whose FLOPs the compiler does not see where it is cudnn.
    """
    target, document = s.place.target, document_tokens(s, options)
    price = target.usd_per_hour if options.price is None else options.price
    flops, tokens = train_flops_per_token(s.model, [document]), s.rows * s.length
    kinds = _kinds(made["update"], s, options)
    step = sum(kinds.values())
    updates, rollouts = _steps(s, options, document)
    found: dict[str, Any] = {
        "flops_per_token": flops, "document_tokens": document, "step_tokens": tokens, "updates": updates, "rollouts": rollouts,
        "usd_per_gpu_hour": price, "rates_of": target.rates_measured_on,
        "roofline_seconds": _roofline(s, made["update"], options, backend),
        "train": {
            "step_seconds": step, "tokens_per_second": tokens / step, "kinds": kinds,
            "mfu": flops * tokens / step / (s.devices * target.bf16_flops_per_s),
        },
    }  # fmt: skip
    if run.decoding:
        found["decode"] = _decode(s, run, made, options)
    seconds = (updates or 0) * step
    if isinstance(s.config, cfg.GrpoConfig):
        found["phases"] = _phases(s, s.config, made, options, found)
        seconds = rollouts * sum(found["phases"].values())
    if updates:
        hours = seconds / 3600
        found["recipe"] = {"hours": hours, "usd": hours * s.devices * price}
    return found


def _kinds(program: Program, s: Shape, options: Options) -> dict[str, float]:
    """Seconds of one run of the program by kind, largest first."""
    document = document_tokens(s, options)
    documents = Documents(s.length * document, share=document / s.length)
    found = timing.by_kind(timing.costs(program.text, program.loops, s.place.target, documents))
    if s.devices > 1:
        links = roofline.collective_seconds(program.collectives, s.place.target, options.hosts, options.devices)
        found["collectives, if nothing overlaps"] = links
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _decode(s: Shape, run: Programs, made: dict[str, Program], options: Options) -> dict[str, Any]:
    """One decoding step of all slots, and the limit that bandwidth sets."""
    slots, context, target = present(run.decoding, "decoding").slots, present(run.decoding, "decoding").context, s.place.target
    program = made["decode"]
    seconds = sum(cost.seconds for cost in timing.costs(program.text, program.loops, target, Documents(0.0, context)))
    rate = roofline.decode_tokens_per_second(s.model, target, slots, context)
    return {
        "slots_per_device": slots, "mean_context": context, "step_seconds": seconds / program.loops,
        "tokens_per_second_per_device": slots * program.loops / seconds, "limit_per_device": rate,
        "kv_bytes_per_token": roofline.kv_bytes_per_token(s.model),
    }  # fmt: skip


def _phases(
    s: Shape, c: cfg.GrpoConfig, made: dict[str, Program], options: Options, found: dict
) -> dict[str, float]:
    """Seconds of one rollout and of what is trained on it, if every completion is as long as it may be."""
    drawn = c.rollout.prompts_per_step * c.rollout.group_size * (1 + c.second_turn.samples) * c.rollout.max_completion_tokens
    state = phases_of.abstract_state(s.model, c.optimizer, s.place.mesh, c.train.freeze)
    away = {"offloading": 2 * device_bytes(state) / s.place.target.host_bytes_per_s} if c.rollout.offload_state else {}
    phases = away | {"rollout": drawn / (found["decode"]["tokens_per_second_per_device"] * s.devices)}
    for name in _SCORED:
        if name in made:
            seconds = _kinds(made[name], s, options).values()
            passes = minibatches_scored(c, present(s.loss, "Shape.loss")) if name == "old log-probs" else c.train.minibatches
            phases[name] = passes * sum(seconds)
    return phases | {"updates": c.train.updates_per_rollout * found["train"]["step_seconds"]}


def document_tokens(s: Shape, options: Options) -> int:
    """Mean tokens of a document: as given, or all of a row."""
    return min(options.document_tokens or s.length, s.length)


def _roofline(s: Shape, update: Program, options: Options, backend: str) -> dict[str, float]:
    """Least seconds of an optimizer step by what bounds it: FLOPs at peak, the state read and written once, the links.

    FLOPs are those that the compiled step does, recomputed ones included; of cudnn's attention, which the compiler does
    not see into, those of the convention.
    """
    target = s.place.target
    attention = train_flops_per_token(s.model, [document_tokens(s, options)]) - weight_flops_per_token(s.model)
    unseen = attention * s.rows * s.length / s.devices if backend == "cudnn" else 0
    flops = hlo.matmul_flops(update.text, s.microbatches, document_tokens(s, options) / s.length) + unseen
    moved = update.argument_bytes + update.output_bytes
    links = roofline.collective_seconds(update.collectives, target, options.hosts, options.devices) if s.devices > 1 else 0.0
    return {"compute": flops / target.bf16_flops_per_s, "memory": moved / target.memory_bytes_per_s, "links": links}


def _steps(s: Shape, options: Options, document: int) -> tuple[int | None, int]:
    """(optimizer updates, rollouts) of the whole recipe; None if that needs the data."""
    c, examples = s.config, options.examples or s.config.data.max_rows
    if c.algorithm == "grpo":
        rollouts = c.train.steps
        if rollouts is None and examples:
            rollouts = math.ceil(present(c.train.epochs, "train.epochs") * examples / c.rollout.prompts_per_step)
        return (rollouts * c.train.updates_per_rollout, rollouts) if rollouts else (None, 0)
    if c.train.steps:
        return c.train.steps, 0
    if examples is None:
        return None, 0
    rows = examples * document / s.length if c.data.packing else examples
    return math.ceil(present(c.train.epochs, "train.epochs") * rows / s.rows), 0
