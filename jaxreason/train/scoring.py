"""Models that are not trained: a reference or a teacher, on the devices or in host memory until they are used."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxreason.train.offload import to_devices, to_host


class FrozenModel:
    """The parameters of a model that is not trained.

    Args:
      params: placed as they are used.
      offload: keep them in pinned host memory and copy them to the devices whenever they are used.
    """

    def __init__(self, params: dict, offload: bool):
        self._shardings = jax.tree.map(lambda x: x.sharding, params) if offload else None
        self.put(params)

    def put(self, params: dict) -> None:
        """Takes other parameters of the same model, placed as the first ones were."""
        self._params = params if self._shardings is None else to_host(params)

    def params(self) -> dict:
        """The parameters on the devices; what was offloaded is a copy, to be let go after use."""
        return self._params if self._shardings is None else to_devices(self._params, self._shardings)


class ScoringModel(FrozenModel):
    """One whose log-probs are wanted: ``score`` is its jitted ``(params, batch) -> HeadStats``."""

    def __init__(self, score: Callable, params: dict, offload: bool):
        super().__init__(params, offload)
        self.score = score


def moved(reference: dict, policy: dict, weight: float) -> dict:
    """``weight`` · policy + (1 − weight) · reference, in the reference's dtypes and places; its arrays are new ones."""
    places = jax.tree.map(lambda x: x.sharding, reference)
    return jax.jit(functools.partial(_mixed, weight=weight), out_shardings=places)(reference, policy)


def _mixed(reference: dict, policy: dict, weight: float) -> dict:
    def mix(old: jax.Array, new: jax.Array) -> jax.Array:
        if weight == 1.0:
            return jnp.copy(new.astype(old.dtype))
        return (weight * new.astype(jnp.float32) + (1.0 - weight) * old.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(mix, reference, policy)
