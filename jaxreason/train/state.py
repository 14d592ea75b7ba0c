"""The train state: made sharded, from random weights or given ones, with what trains and what does not told apart.

Of a model with adapters these are what trains, and all of its own parameters are frozen beside them.
"""

import fnmatch
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxreason.errors import UserError
from jaxreason.model import ModelConfig, frozen_base, full_shapes, init, init_adapters, lora
from jaxreason.model.quantized import map_plain
from jaxreason.plugins import nearest
from jaxreason.sharding import shardings
from jaxreason.types import TrainState


def abstract(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, freeze: Sequence[str] = ()
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated. ``freeze``: see :func:`split`."""
    shapes = jax.eval_shape(lambda: _drawn(config, optimizer, jax.random.key(0), freeze))
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings(shapes, mesh)
    )


def _fresh(
    params: dict, adapters: dict | None, optimizer: optax.GradientTransformation, freeze: Sequence[str]
) -> TrainState:
    trainable, frozen = split(params, freeze) if adapters is None else (adapters, params)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))


def _drawn(
    config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array, freeze: Sequence[str]
) -> TrainState:
    params = frozen_base(init(config, key), config)
    return _fresh(params, _drawn_adapters(config, params, key), optimizer, freeze)


def _drawn_adapters(config: ModelConfig, params: dict, key: jax.Array) -> dict | None:
    if config.adapter is None:
        return None
    if config.adapter.init == "pissa":
        return lora.as_adapters(lora.split(params)[1])
    return lora.with_magnitudes(init_adapters(config, jax.random.fold_in(key, 1)), params)


def draw_adapters(config: ModelConfig, params: dict, mesh: Mesh, seed: int) -> dict | None:
    """The adapters that a run begins with beside ``params``; they change nothing yet, or they are what PiSSA's base
    lacks. None where the config has none."""
    if config.adapter is None:
        return None
    draw = functools.partial(_drawn_adapters, config)
    out = shardings(jax.eval_shape(draw, params, start_key(seed)), mesh)
    return jax.jit(draw, out_shardings=out)(params, start_key(seed))


def abstract_params(config: ModelConfig, mesh: Mesh, dtype: str) -> dict:
    """Sharded parameters in ``dtype``, those of its adapters included; what is quantized stays what it is."""
    wanted = map_plain(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype)), full_shapes(config))
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), wanted, shardings(wanted, mesh)
    )


def create(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, freeze: Sequence[str] = ()
) -> TrainState:
    """A state with random weights, each leaf born on its own devices."""
    out = jax.tree.map(lambda s: s.sharding, abstract(config, optimizer, mesh, freeze))
    make: Callable = jax.jit(lambda key: _drawn(config, optimizer, key, freeze), out_shardings=out)
    return make(start_key(seed))


def start_key(seed: int) -> jax.Array:
    """The key of a run's random weights."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def adopt(
    params: dict, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, freeze: Sequence[str] = (),
    adapters: dict | None = None,
) -> TrainState:  # fmt: skip
    """A state at step 0 around given parameters of the whole model and, where the config has them, of its adapters."""
    out = jax.tree.map(lambda s: s.sharding, abstract(config, optimizer, mesh, freeze))
    params = jax.tree.map(jax.device_put, params, out.model_params if adapters is None else out.frozen)
    return jax.jit(lambda p, a: _fresh(p, a, optimizer, freeze), out_shardings=out, donate_argnums=(0, 1))(params, adapters)


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
