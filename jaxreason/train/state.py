"""The train state: made sharded, from random weights or given ones, with what trains and what does not told apart."""

import fnmatch
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxreason.errors import UserError
from jaxreason.model import ModelConfig, init, shapes
from jaxreason.plugins import nearest
from jaxreason.sharding import shardings
from jaxreason.types import TrainState


def abstract(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, freeze: Sequence[str] = ()
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated. ``freeze``: see :func:`split`."""
    shapes = jax.eval_shape(lambda: _fresh(init(config, jax.random.key(0)), optimizer, freeze))
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings(shapes, mesh)
    )


def _fresh(params: dict, optimizer: optax.GradientTransformation, freeze: Sequence[str]) -> TrainState:
    trainable, frozen = split(params, freeze)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))


def abstract_params(config: ModelConfig, mesh: Mesh, dtype: str) -> dict:
    """Sharded parameters in ``dtype``."""
    wanted, stored = shapes(config), jnp.dtype(dtype)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, stored, sharding=place), wanted, shardings(wanted, mesh)
    )


def create(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, freeze: Sequence[str] = ()
) -> TrainState:
    """A state with random weights, each leaf born on its own devices."""
    out = jax.tree.map(lambda s: s.sharding, abstract(config, optimizer, mesh, freeze))
    make: Callable = jax.jit(lambda key: _fresh(init(config, key), optimizer, freeze), out_shardings=out)
    return make(start_key(seed))


def start_key(seed: int) -> jax.Array:
    """The key of a run's random weights."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def adopt(
    params: dict, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, freeze: Sequence[str] = ()
) -> TrainState:
    """A state at step 0 around given parameters of the whole model."""
    out = jax.tree.map(lambda s: s.sharding, abstract(config, optimizer, mesh, freeze))
    params = jax.tree.map(jax.device_put, params, out.model_params)
    return jax.jit(lambda p: _fresh(p, optimizer, freeze), out_shardings=out, donate_argnums=0)(params)


def split(params: dict, freeze: Sequence[str]) -> tuple[dict, dict]:
    """(what trains, what does not): a parameter is frozen if a pattern of ``freeze`` matches its dotted path.

    Patterns are those of a shell (``embedding``, ``layers.mlp.*``). Raises UserError for a pattern that matches nothing, and
    where nothing is left to train.
    """
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    names = {path: ".".join(path) for path in leaves}
    for pattern in freeze:
        if not fnmatch.filter(names.values(), pattern):
            hint = nearest(pattern, names.values())
            raise UserError(f"train.freeze: no parameter matches {pattern!r}{hint}; there are {', '.join(names.values())}")
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in leaves.items():
        node = parts[any(fnmatch.fnmatchcase(names[path], pattern) for pattern in freeze)]
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    if not parts[0]:
        raise UserError(f"train.freeze {list(freeze)} freezes every parameter; leave one that trains")
    return parts
