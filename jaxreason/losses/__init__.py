"""Losses as pure functions of arrays, composed from axes: ``get(name, **options)``; ``docs/losses.md`` lists them."""

from jaxreason.losses.check import check
from jaxreason.losses.inputs import PolicyInputs, SftInputs, clean, totals_of
from jaxreason.losses.reduce import token_weights
from jaxreason.losses.registry import Loss, defaults, get, loss, names

__all__ = [
    "Loss",
    "PolicyInputs",
    "SftInputs",
    "check",
    "clean",
    "defaults",
    "get",
    "loss",
    "names",
    "token_weights",
    "totals_of",
]
