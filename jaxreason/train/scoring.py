"""Models that are not trained: a reference or a teacher, on the devices or in host memory until they are used."""

from collections.abc import Callable

import jax

from jaxreason.train.offload import to_devices, to_host


class FrozenModel:
    """The parameters of a model that is not trained.

    Args:
      params: placed as they are used.
      offload: keep them in pinned host memory and copy them to the devices whenever they are used.
    """

    def __init__(self, params: dict, offload: bool):
        self._shardings = None
        if offload:
            self._shardings = jax.tree.map(lambda x: x.sharding, params)
            params = to_host(params)
        self._params = params

    def params(self) -> dict:
        """The parameters on the devices; what was offloaded is a copy, to be let go after use."""
        return self._params if self._shardings is None else to_devices(self._params, self._shardings)


class ScoringModel(FrozenModel):
    """One whose log-probs are wanted: ``score`` is its jitted ``(params, batch) -> HeadStats``."""

    def __init__(self, score: Callable, params: dict, offload: bool):
        super().__init__(params, offload)
        self.score = score
