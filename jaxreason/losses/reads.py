"""Which optional inputs and extras a function of one's own reads: found by tracing it with inputs that take note."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax import Array

from jaxreason.losses.inputs import OPTIONAL_INPUTS, Inputs, SftInputs


class _Noting:
    """Mixed into a class of inputs: notes the names of the fields and extras that are read."""

    base: type[Inputs]
    fields: set[str]
    extra_names: set[str]

    def __init__(self, **values: Any):
        super().__init__(**values)
        extras = _NotingExtras(values["extras"])
        extras.names, extras.filling = type(self).extra_names, values["logp"]
        object.__setattr__(self, "extras", extras)

    def __getattribute__(self, name: str) -> Any:
        # dataclasses.replace copies every field and reads none.
        if sys._getframe(1).f_globals.get("__name__") != "dataclasses":
            type(self).fields.add(name)
        return super().__getattribute__(name)


class _NotingExtras(dict):
    """Has every extra that is asked for."""

    names: set[str]
    filling: Array

    def __missing__(self, name: str) -> Array:
        self.names.add(name)
        return self.filling

    def get(self, name: str, default: object = None) -> Array:
        return self[name]

    def __contains__(self, name: object) -> bool:
        return self[name] is not None


def reads(function: Callable, inputs: Inputs, options: Mapping[str, Any]) -> frozenset[str]:
    """The optional inputs and the extras that ``function(inputs, **options)`` touches; raises what it raises.

    A loss that is called inside counts with what it declares, not with what it looks at.
    """
    base = type(inputs)
    fields: set[str] = set()
    extra_names: set[str] = set()
    known = {"base": base, "fields": fields, "extra_names": extra_names}
    noting = type(base.__name__, (_Noting, base), known)  # the name is what an error in the function calls its argument

    def run(arrays: dict[str, Any]) -> None:
        function(noting(**arrays), **options)  # what it returns is looked at later

    jax.eval_shape(run, dict(vars(inputs)))
    kind = "sft" if base is SftInputs else "policy"
    return frozenset(fields & set(OPTIONAL_INPUTS[kind]) | extra_names)


def unnoted(inputs: Inputs, needs: Iterable[str]) -> Inputs:
    """Plain inputs for a loss that declares its ``needs``; where ``inputs`` take note, these are noted."""
    if not isinstance(inputs, _Noting):
        return inputs
    noting, values = type(inputs), dict(vars(inputs))
    extras = [name for name in needs if name not in values]
    noting.fields.update(needs)
    noting.extra_names.update(extras)
    return noting.base(**values | {"extras": {name: values["logp"] for name in extras}})
