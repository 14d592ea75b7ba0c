"""Losses as pure functions of arrays, composed from axes: ``get(name, **options)``; ``docs/losses.md`` lists them."""

from jaxreason.losses import advantage, kl
from jaxreason.losses.check import check
from jaxreason.losses.estimator import Estimator, estimator
from jaxreason.losses.inputs import PolicyInputs, SftInputs, clean, totals_of
from jaxreason.losses.reduce import reduction_weights
from jaxreason.losses.registry import Loss, check_filled, defaults, divergence, get, loss, names

__all__ = [
    "Estimator",
    "Loss",
    "PolicyInputs",
    "SftInputs",
    "advantage",
    "check",
    "check_filled",
    "clean",
    "defaults",
    "divergence",
    "estimator",
    "get",
    "kl",
    "loss",
    "names",
    "reduction_weights",
    "totals_of",
]
