"""Code of the user's own, by import path: loading it, checking its options, and the nearest known name for messages.

Losses, advantage estimators, rewards, hooks and samplers all come in through here. Workers that grade import this module,
so it imports neither jax nor numpy, and pydantic only where options are checked.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxreason.errors import UserError
from jaxreason.paths import expanded


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the closest known word, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def absolute(target: str) -> str:
    """``path/to/file.py:function`` with an absolute path, so that a process in another folder finds it; a module as it is."""
    place, _, attribute = target.rpartition(":")
    return f"{expanded(place).resolve()}:{attribute}" if place.endswith(".py") else target


def mark(function: Callable, **marks: Any) -> Callable:
    """The function itself, with ``marks`` as attributes: what a decorator declares of it."""
    for name, value in marks.items():
        setattr(function, name, value)
    return function


def load(target: str, key: str) -> Callable:
    """The function that ``package.module:function`` or ``path/to/file.py:function`` names.

    A file is run once a process, however often and by whatever path it is loaded, and ``sys.modules`` holds it while it
    runs, where dataclasses and pickle look their module up.

    Raises:
      UserError: naming the config key ``key``: no such file or function, with what there is, or what the import raised.
    """
    place, _, attribute = absolute(target).rpartition(":")
    if not place or not attribute:
        raise UserError(f"{key} {target}: write package.module:function or path/to/file.py:function")
    module = _file(target, Path(place), key) if place.endswith(".py") else _module(target, place, key)
    function = getattr(module, attribute, None)
    if not callable(function):
        own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        listed = [k for k in own if not k.startswith("_")]
        raise UserError(
            f"{key} {target}: {place} has no function {attribute}{nearest(attribute, own)}; it has {', '.join(listed) or 'none'}"
        )
    return function


def _module(target: str, name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the module is the user's: whatever it raises is theirs to read
        raise _failed(target, name, key, error) from error


def _file(target: str, path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{key} {target}: no such file {path}")
    name = f"jaxreason_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it is a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        raise _failed(target, str(path), key, error) from error
    return module


def _failed(target: str, place: str, key: str, error: BaseException) -> UserError:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == place]
    line = f", line {lines[-1]}" if lines else ""
    return UserError(f"{key} {target}: importing {place} failed{line}: {type(error).__name__}: {error}")


def fills(function: Callable) -> frozenset[str]:
    """The extras that a reward, an advantage estimator or a hook declares to fill, as its attribute ``fills``."""
    return frozenset(getattr(function, "fills", ()))


def check_options(
    function: Callable, options: Mapping[str, Any], key: str, given: Collection[str] = ()
) -> dict[str, Any]:
    """``options`` as ``function`` declares them: known names, none missing, values of its annotations (pydantic's rules).

    A truth value is no number, and a number is finite. An annotation that cannot be evaluated or that pydantic does not
    know leaves its option unchecked.

    Args:
      function: its first parameter is not an option, nor are those called as in ``given``: the caller fills them.
      key: the config key of the options, such as ``loss.options``.

    Raises:
      UserError: naming ``key`` and the option.
    """
    owner = getattr(function, "__name__", type(function).__name__)
    try:
        known = declared_options(function, given)
    except (TypeError, ValueError):
        raise UserError(
            f"{key}: {owner} must take what it is called with as its first argument: a reward the sample, a loss the "
            "inputs, an advantage estimator the rewards"
        ) from None
    return check_values(options, known, key, owner)


def declared_options(function: Callable, given: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    """The parameters of ``function`` but its first and those ``given``, with evaluated annotations; ``**rest`` is one of
    them. Raises TypeError or ValueError for a function without a first positional parameter, or without a signature."""
    first, *rest = inspect.signature(function).parameters.values()
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise TypeError("no positional parameter")
    names = getattr(inspect.unwrap(function), "__globals__", {})
    return {p.name: p.replace(annotation=_evaluated(p.annotation, names)) for p in rest if p.name not in given}


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, names)
    except Exception:  # a name that only a type checker imports
        return Any


def check_values(
    options: Mapping[str, Any], known: Mapping[str, inspect.Parameter], key: str, owner: str
) -> dict[str, Any]:
    """As :func:`check_options`, for the parameters ``known`` of one or several functions, called ``owner`` in messages."""
    named = {name: p for name, p in known.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in options:
        if name not in named and not open_ended:
            listed = ", ".join(named) or "none"
            raise UserError(f"{key}.{name}: {owner} has no option {name}{nearest(name, named)}; it has: {listed}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise UserError(f"{key}.{name} is missing: {owner} needs it and has no default")
    return {
        name: _checked(value, named[name].annotation, f"{key}.{name}") if name in named else value
        for name, value in options.items()
    }


def _checked(value: Any, annotation: Any, key: str) -> Any:
    import pydantic  # here, so that workers, which get checked options, start without it

    try:
        adapter = pydantic.TypeAdapter(annotation)
    except pydantic.errors.PydanticUserError:
        return value
    try:
        found = adapter.validate_python(value)
    except pydantic.ValidationError as error:
        hint = nearest(value, [str(x) for x in getattr(annotation, "__args__", ())]) if isinstance(value, str) else ""
        raise UserError(f"{key} is {value!r}: {error.errors()[0]['msg']}{hint}") from None
    if isinstance(value, bool) and type(found) in (int, float):
        raise UserError(f"{key} is {value!r}: a number is expected, not a truth value")
    if isinstance(found, float) and not math.isfinite(found):
        raise UserError(f"{key} is {value!r}: a finite number is expected")
    return found
