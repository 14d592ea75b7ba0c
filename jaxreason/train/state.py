"""The train state: made sharded, from random weights or given ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxreason.model import ModelConfig, init
from jaxreason.sharding import shardings
from jaxreason.types import TrainState


def abstract(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda: _fresh(init(config, jax.random.key(0)), optimizer))
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings(shapes, mesh)
    )


def _fresh(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def create(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A state with random weights, each leaf born on its own devices."""
    out = jax.tree.map(lambda s: s.sharding, abstract(config, optimizer, mesh))
    make: Callable = jax.jit(lambda key: _fresh(init(config, key), optimizer), out_shardings=out)
    return make(jax.random.fold_in(jax.random.key(seed), 0))


def adopt(params: dict, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A state at step 0 around given parameters."""
    out = jax.tree.map(lambda s: s.sharding, abstract(config, optimizer, mesh))
    params = jax.tree.map(jax.device_put, params, out.params)
    return jax.jit(lambda p: _fresh(p, optimizer), out_shardings=out, donate_argnums=0)(params)
