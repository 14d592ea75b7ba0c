"""Which programs a config's run consists of, and what else lies on a device while each of them runs."""

import dataclasses
import math
from collections.abc import Callable

from jaxreason import config as cfg
from jaxreason.errors import present
from jaxreason.losses import Loss
from jaxreason.model import ModelConfig
from jaxreason.model.attention import resolve
from jaxreason.model.cudnn import assume_capability
from jaxreason.plan import architecture, phases, workspace
from jaxreason.plan.compile import Program
from jaxreason.plan.phases import Place
from jaxreason.rl.collect import slots_of
from jaxreason.rl.shapes import Shapes, keeps_reference, minibatches_scored, shares_reference
from jaxreason.sampler import Engine, Sampling, sampling_of
from jaxreason.sampler.engine import cache
from jaxreason.sampler.engine.generation import prefill_rows
from jaxreason.sampler.engine.slots import Room
from jaxreason.sampler.engine.spread import devices_for
from jaxreason.sharding import device_bytes
from jaxreason.train import sft
from jaxreason.train import state as states
from jaxreason.train.setup import abstract_batch
from jaxreason.train.step import BASE, COMPARED, ITSELF, Compared
from jaxreason.types import BATCH_AXES

_PROBLEM_TOKENS = 512  # of a held-out problem's prompt in SFT, which has no limit of its own


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all programs need to know of a config."""

    config: cfg.RunConfig
    model: ModelConfig
    place: Place
    hosts: int  # each runs one process
    rows: int  # of one optimizer step
    length: int  # of a row
    microbatches: int
    loss: Loss | None = None  # of a GRPO config
    rl: Shapes | None = None  # of a GRPO config

    @property
    def devices(self) -> int:
        return self.place.mesh.size


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program that is yet to be compiled."""

    compile: Callable[[], Program]
    beside: dict[str, int]  # what else a device holds meanwhile, in bytes


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a device decodes."""

    slots: int
    length: int  # positions of a buffer
    context: float  # mean positions that a step reads, if every sequence becomes as long as it may
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class Programs:
    planned: dict[str, Planned]  # the update first
    frozen: dict[str, int]  # models that stay on the devices all the time, in bytes of one device
    decoding: Decoding | None  # of the rollout, or of the evaluation where there is no rollout
    head_again: bool  # whether the head's backward pass makes the logits again, chunk by chunk


def of(s: Shape) -> Programs:
    """Every program that takes memory worth counting, in the order of a step."""
    if isinstance(s.config, cfg.SftConfig):
        return _sft(s, s.config)
    return _grpo(s, s.config, present(s.loss, "Shape.loss"), present(s.rl, "Shape.rl"))


def _state(s: Shape) -> tuple[dict[str, int], dict[str, int]]:
    """The train state, and what of it is beside a program that is given the parameters."""
    state = phases.abstract_state(s.model, s.config.optimizer, s.place.mesh, s.config.train.freeze)
    return {"train state": device_bytes(state)}, {"optimizer state": device_bytes(state.opt_state)}


def _bytes_of(s: Shape, model: ModelConfig) -> int:
    return device_bytes(states.abstract_params(model, s.place.mesh, model.execution.compute_dtype))


def _workspace(s: Shape) -> dict[str, int]:
    """cuDNN's scratch in an update, which the compiler does not know without a card.

    With layers in a loop it comes on top of what the compiler counts; with layers written out the head's chunks need more,
    at another time.
    """
    run, arch, mesh = s.model.execution, s.model.arch, s.place.mesh.shape
    with assume_capability(s.place.target.capability):
        backend = resolve(run.attention, run.compute_dtype, arch.head_dim)
    if backend != "cudnn" or not run.scan_layers:
        return {}
    rows = s.rows // s.microbatches // math.prod(mesh[axis] for axis in BATCH_AXES)
    heads = arch.num_heads // mesh["tensor"]
    return {"cuDNN's scratch": workspace.backward_bytes(rows, s.length, run.max_segments, heads, arch.head_dim)}


def _sft(s: Shape, c: cfg.SftConfig) -> Programs:
    loss = sft.find_loss(c)
    weighted = (c.data.think_weight, c.data.answer_weight) != (1.0, 1.0)
    batch = abstract_batch(s.rows, s.length, s.place.mesh, ("token_weights",) if weighted else ())
    other: Compared | None = None
    frozen: dict[str, int] = {}
    if "teacher_divergence" in loss.needs:
        teacher = architecture.teacher(c.model, present(c.teacher.weights, "teacher.weights"))
        other, frozen = teacher, {"teacher model": _bytes_of(s, teacher)}
    elif not loss.needs.isdisjoint(COMPARED) and s.model.adapter:
        other = BASE
    elif not loss.needs.isdisjoint(COMPARED):
        other, frozen = s.model, {"reference model": _bytes_of(s, s.model)}

    def update() -> Program:
        return phases.update(
            s.place, s.model, c.optimizer, loss, batch, s.microbatches, second=other, noise=sft.noise_of(c),
            freeze=c.train.freeze,
        )  # fmt: skip

    planned = {"update": Planned(update, _workspace(s))}  # the frozen model is among the update's arguments
    decoding: Decoding | None = None
    state, moments = _state(s)
    if c.data.eval_rows or c.data.eval_source:
        whole = abstract_batch(s.rows, s.length, s.place.mesh)
        held_out = Planned(lambda: phases.held_out_loss(s.place, "held-out loss", s.model, whole), moments | frozen)
        planned["held-out loss"] = held_out
    if c.eval.problems:
        # Every process decodes all problems, with its own devices.
        prompt, limit = min(_PROBLEM_TOKENS, c.data.max_length), c.eval.max_completion_tokens
        sampling = Sampling(temperature=0.0, max_completion_tokens=limit)
        found, decoding = _decoding(s, "", c.eval.slots, prompt, sampling, state | frozen)
        planned |= {"decoding weights": _weights(s, moments | frozen)} | found
    return Programs(planned, frozen, decoding, head_again=not loss.tokenwise)


def _grpo(s: Shape, c: cfg.GrpoConfig, loss: Loss, rl: Shapes) -> Programs:
    batch, temperature = rl.batch(s.place.mesh), c.rollout.temperature
    models, offloaded, read = _untrained(s, c, loss)
    second: Compared | None = None if c.teacher.divergence is None else ITSELF if read is None else models[read]
    frozen = {f"{name} model": _bytes_of(s, model) for name, model in models.items() if not offloaded[name]}
    if s.model.adapter:
        frozen.pop("reference model", None)  # it is what the adapters stand beside
    state, moments = _state(s)

    def update() -> Program:
        return phases.update(
            s.place, s.model, c.optimizer, loss, batch, s.microbatches, temperature, second=second, freeze=c.train.freeze
        )

    def scored(name: str, model: ModelConfig, dtype: str) -> Callable[[], Program]:
        return lambda: phases.score(s.place, name, model, dtype, batch, s.microbatches, temperature)

    beside_update = {key: size for key, size in frozen.items() if key != f"{read} model"}  # which is an argument of it
    planned = {"update": Planned(update, beside_update | _workspace(s)), "decoding weights": _weights(s, moments | frozen)}
    resident = frozen if c.rollout.offload_state else state | frozen
    room = Room(s.place.target.limit_bytes, sum(resident.values()), s.devices // s.hosts, s.hosts)
    slots = math.ceil(slots_of(c, s.model, rl.longest_prompt, room) / s.hosts)
    found, decoding = _decoding(s, "", slots, rl.longest_prompt, sampling_of(c.rollout), resident)
    planned |= found
    for name, model in models.items():
        if name == read == "teacher":  # no pass of its own scores it
            continue
        beside = {key: size for key, size in frozen.items() if key != f"{name} model"}
        shared = name == "reference" and s.model.adapter is not None
        dtype = model.execution.param_dtype if shared else model.execution.compute_dtype
        planned[name] = Planned(scored(name, model, dtype), (moments if shared else state) | beside)
    if minibatches_scored(c, loss):
        planned["old log-probs"] = Planned(scored("old log-probs", s.model, s.model.execution.param_dtype), moments | frozen)
    if c.eval.problems:
        greedy = Sampling(temperature=0.0, max_completion_tokens=c.eval.max_completion_tokens)
        found, graded = _decoding(s, "evaluation: ", c.eval.slots, rl.longest_prompt, greedy, state | frozen)
        kept = sum(state.values()) if c.rollout.offload_state else 0  # an evaluation keeps the state on the devices
        planned |= found if graded.cache_bytes + kept > decoding.cache_bytes else {}
    return Programs(planned, frozen, decoding, head_again=True)


def _untrained(s: Shape, c: cfg.GrpoConfig, loss: Loss) -> tuple[dict[str, ModelConfig], dict[str, bool], str | None]:
    """The models that are not trained, by name; which of them wait in host memory; and the name of the one whose distributions an
    update reads."""
    models, offloaded = {}, {}
    if keeps_reference(c, loss):
        models["reference"], offloaded["reference"] = s.model, c.kl.offload
    weights, name = c.teacher.weights, "reference" if shares_reference(c, loss) else "teacher"
    if weights not in (None, "self") and name == "teacher":
        models[name] = s.model if weights == "start" else architecture.teacher(c.model, present(weights, "teacher.weights"))
        offloaded[name] = c.teacher.offload
    return models, offloaded, None if c.teacher.divergence is None or weights == "self" else name


def _weights(s: Shape, beside: dict[str, int]) -> Planned:
    return Planned(lambda: phases.weights(s.place, "decoding weights", s.model), beside)


def _decoding(
    s: Shape, prefix: str, slots: int, prompt: int, sampling: Sampling, beside: dict[str, int]
) -> tuple[dict[str, Planned], Decoding]:
    """Prefill and decoding of ``slots`` sequences over one process's devices, each with whole weights; and a Decoding."""
    share = math.ceil(slots / devices_for(slots, s.devices // s.hosts))
    length = cache.longest(prompt + sampling.max_completion_tokens)
    rows, padded = prefill_rows(prompt, share, devices=1), cache.prompt_bucket(max(prompt - 1, 1), length)
    buffers, prompts = cache.num_bytes(s.model, share, length), cache.num_bytes(s.model, rows, padded)
    engine = Engine(s.model, s.model.arch.stop_ids or (0,), sampling, share)
    first, second = f"{prefix}prefill", f"{prefix}decode"
    planned = {
        first: Planned(lambda: phases.prefill(s.place, engine, rows, padded, first), beside | {"decoding caches": buffers}),
        second: Planned(lambda: phases.decode(s.place, engine, length, second), beside | {"prompts' caches": prompts}),
    }
    return planned, Decoding(share, length, prompt / 2 + sampling.max_completion_tokens / 2, buffers)
