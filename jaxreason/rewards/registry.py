"""Reward functions by name: the built-in ones, and any function of the user's own."""

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxreason.errors import UserError
from jaxreason.rewards import answer, countdown, format, gym, length

REWARDS: dict[str, Callable] = {
    "accuracy": answer.accuracy,
    "countdown": countdown.countdown,
    "reasoning_gym": gym.reasoning_gym,
    "format": format.format,
    "tag_count": format.tag_count,
    "soft_overlong": length.soft_overlong,
    "cosine": length.cosine,
    "length": length.length,
    "repetition": length.repetition,
}
ALIASES = {"exact_answer": "accuracy"}
_PREPARE = {"accuracy": answer.prepare, "cosine": answer.prepare, "reasoning_gym": gym.prepare}


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward function with its options: ``function(sample, **options)``, or a list of samples where ``batch``."""

    name: str  # as the user wrote it; labels metrics and errors
    target: str  # what a worker process loads it by: a built-in name, module:function, or absolute file:function
    function: Callable
    options: Mapping[str, Any]

    @property
    def batch(self) -> bool:
        return bool(getattr(self.function, "batch", False))


def get(name: str, **options: Any) -> Reward:
    """The reward called ``name``: a built-in, ``package.module:function``, or ``path/file.py:function``.

    Raises UserError for an unknown name, module, file or function, and for an option that the function does not have,
    that it needs and lacks, or that does not fit its annotation; the message gives the nearest valid one.
    """
    target = _absolute(ALIASES.get(name, name))
    function = _find(name, target)
    return Reward(name, target, function, _checked(name, function, options))


def load(target: str, options: Mapping[str, Any]) -> Reward:
    """What ``get`` checked, once more, in a worker process, and made ready to be called."""
    if target in _PREPARE:
        _PREPARE[target](**options)
    return Reward(target, target, _find(target, target), options)


def _find(name: str, target: str) -> Callable:
    if target in REWARDS:
        return REWARDS[target]
    place, colon, attribute = target.rpartition(":")
    if not colon or not place or not attribute:
        known = [*REWARDS, *ALIASES]
        raise UserError(
            f"reward {name!r} is unknown{_nearest(name, known)}; known: {', '.join(known)}, "
            "or package.module:function, or path/file.py:function"
        )
    module = _import_file(name, Path(place)) if place.endswith(".py") else _import_module(name, place)
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"reward {name!r}: {place} has no function {attribute}{_nearest(attribute, functions)}")
    return function


def _absolute(target: str) -> str:
    """A file's absolute path, so that a worker started later finds it from any folder."""
    place, _, attribute = target.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{attribute}" if place.endswith(".py") else target


def _import_module(name: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise UserError(f"reward {name!r}: cannot import {place}: {type(error).__name__}: {error}") from error


def _import_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"reward {name!r}: no file {path}")
    key = f"jaxreason_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # before it runs: dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[key]
        raise UserError(f"reward {name!r}: cannot import {path}: {type(error).__name__}: {error}") from error
    return module


def _checked(name: str, function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    import pydantic  # here, so that workers, which get checked options, start without it

    try:
        first, *rest = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # no parameter, or a builtin that does not tell
        first, rest = None, []
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise UserError(f"reward {name!r}: the function must take the sample as its first argument")
    known = {p.name: p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in rest)
    for key in options:
        if key not in known and not open_ended:
            listed = ", ".join(known) or "none"
            raise UserError(f"reward {name!r} has no option {key}{_nearest(key, known)}; its options: {listed}")
    missing = [key for key, p in known.items() if p.default is p.empty and key not in options]
    if missing:
        raise UserError(f"reward {name!r}: option {missing[0]} is missing and has no default")
    try:
        annotations = inspect.get_annotations(function, eval_str=True)
    except NameError:  # names of a type checker's imports: such options go unchecked
        annotations = {}
    done = {}
    for key, value in options.items():
        try:
            done[key] = pydantic.TypeAdapter(annotations.get(key, Any)).validate_python(value)
        except pydantic.ValidationError as error:
            raise UserError(f"reward {name!r}: option {key} is {value!r}: {error.errors()[0]['msg']}") from None
    return done


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
