"""The programs of a run, built from the functions that the run itself jits, over shapes in place of arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason import losses
from jaxreason.model import ModelConfig, full_shapes, unstack
from jaxreason.plan.compile import Program, compile_program
from jaxreason.sampler import Engine
from jaxreason.sampler.engine import cache
from jaxreason.sampler.engine.steps import empty_slots
from jaxreason.sharding import batch_sharding, replicated
from jaxreason.targets import Target
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.step import Compared, Noise, abstract_second, batch_loss, make_score, make_train_step
from jaxreason.types import Batch, Totals, TrainState

_SCHEDULE_STEPS = 1000  # any number: the schedule is a formula in the step


@dataclasses.dataclass(frozen=True)
class Place:
    """Where programs are compiled for, and how."""

    target: Target
    mesh: Mesh
    deterministic: bool = False

    def compile(self, name: str, jitted: jax.stages.Wrapped, *arguments: Any, loops: int = 1) -> Program:
        return compile_program(name, jitted, *arguments, loops=loops, **vars(self))


def abstract_state(config: ModelConfig, optimizer: cfg.Optimizer, mesh: Mesh, freeze: Sequence[str] = ()) -> TrainState:
    """The train state as shapes."""
    return states.abstract(config, opt.make(optimizer, _SCHEDULE_STEPS), mesh, freeze)


def update(
    place: Place,
    config: ModelConfig,
    optimizer: cfg.Optimizer,
    loss: losses.Loss,
    batch: Batch[jax.ShapeDtypeStruct],
    microbatches: int,
    temperature: float = 1.0,
    second: Compared | None = None,
    noise: Noise | None = None,
    freeze: Sequence[str] = (),
) -> Program:
    """One optimizer step, state donated. ``second``: the model that the loss compares with."""
    transformation = opt.make(optimizer, _SCHEDULE_STEPS)
    schedule = opt.schedule(optimizer, _SCHEDULE_STEPS)
    state = abstract_state(config, optimizer, place.mesh, freeze)
    step = make_train_step(config, loss, transformation, schedule, microbatches, temperature, second, noise)
    out = (jax.tree.map(lambda s: s.sharding, state), replicated(place.mesh), batch_sharding(place.mesh))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
    return place.compile("update", jitted, state, batch, abstract_second(second, place.mesh), loops=microbatches)


def score(
    place: Place,
    name: str,
    config: ModelConfig,
    dtype: str,
    batch: Batch[jax.ShapeDtypeStruct],
    microbatches: int,
    temperature: float,
) -> Program:
    """Log-probs under parameters in ``dtype``: the policy's own before an update, a reference's, or a teacher's."""
    function = jax.jit(make_score(config, microbatches, temperature), out_shardings=batch_sharding(place.mesh))
    arguments = states.abstract_params(config, place.mesh, dtype), batch
    return place.compile(name, function, *arguments, loops=microbatches)


def held_out_loss(place: Place, name: str, config: ModelConfig, batch: Batch[jax.ShapeDtypeStruct]) -> Program:
    """The nll of held-out rows, all of a batch at once."""
    nll, one = losses.get("nll"), Totals(*(jnp.ones(()),) * 3)
    function = jax.jit(lambda params, batch: batch_loss(params, config, nll, batch, one)[0])
    return place.compile(name, function, states.abstract_params(config, place.mesh, config.execution.param_dtype), batch)


def weights(place: Place, name: str, config: ModelConfig) -> Program:
    """The copy of the parameters that decoding reads, whole on every device."""
    function = jax.jit(lambda params: unstack(params, config), out_shardings=replicated(place.mesh))
    return place.compile(name, function, states.abstract_params(config, place.mesh, config.execution.param_dtype))


def rollout_params(config: ModelConfig, mesh: Mesh) -> dict:
    """Per-layer weights in the compute dtype, whole on every device, as decoding reads them."""
    return _whole(jax.eval_shape(lambda params: unstack(params, config), full_shapes(config)), mesh)


def prefill(place: Place, engine: Engine, prompts: int, length: int, name: str = "prefill") -> Program:
    """Keys and values of ``prompts`` prompts of ``length`` tokens."""
    tokens = _whole(jax.ShapeDtypeStruct((prompts, length), jnp.int32), place.mesh)
    return place.compile(name, engine.programs().prefill, rollout_params(engine.config, place.mesh), tokens, tokens)


def decode(place: Place, engine: Engine, length: int, name: str = "decode") -> Program:
    """A chunk of decoding steps over ``engine.slots`` sequences with buffers of ``length`` positions."""
    slots = jax.eval_shape(lambda: empty_slots(engine.slots, engine.pad_id))
    caches = jax.eval_shape(lambda: cache.allocate(engine.config, engine.slots, length))
    idle = jax.ShapeDtypeStruct((), jnp.int32)
    state = (_whole(tree, place.mesh) for tree in (slots, caches, idle))
    params = rollout_params(engine.config, place.mesh)
    return place.compile(name, engine.programs().decode, params, *state, loops=engine.chunk)


def _whole(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated(mesh)), tree)
