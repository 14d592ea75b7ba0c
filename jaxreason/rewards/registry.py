"""Reward functions by name: the built-in ones, and any function of the user's own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxreason import plugins
from jaxreason.errors import UserError
from jaxreason.rewards import answer, countdown, format, gym, language, length

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
    "language": language.language,
}
ALIASES = {"exact_answer": "accuracy"}
_PREPARE: dict[str, Callable[..., None]] = {"accuracy": answer.prepare, "cosine": answer.prepare, "reasoning_gym": gym.prepare}


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

    @property
    def fills(self) -> frozenset[str]:
        """The extras that it returns in ``Scored``, by name."""
        return frozenset(getattr(self.function, "fills", ()))


def get(name: str, /, **options: Any) -> Reward:
    """The reward called ``name``: a built-in, ``package.module:function``, or ``path/file.py:function``.

    Raises UserError for an unknown name, module, file or function, and for an option that the function does not have,
    that it needs and lacks, or that does not fit its annotation; the message gives the nearest valid one.
    """
    target = plugins.absolute(ALIASES.get(name, name))
    function = _find(target)
    return Reward(name, target, function, plugins.check_options(function, options, "reward.functions.options"))


def load(target: str, options: Mapping[str, Any]) -> Reward:
    """What ``get`` checked, once more, in a worker process, and made ready to be called."""
    if target in _PREPARE:
        _PREPARE[target](**options)
    return Reward(target, target, _find(target), options)


def _find(target: str) -> Callable:
    if target in REWARDS:
        return REWARDS[target]
    if ":" not in target:
        known = [*REWARDS, *ALIASES]
        raise UserError(
            f"reward {target!r} is unknown{plugins.nearest(target, known)}; known: {', '.join(known)}, "
            "or package.module:function, or path/file.py:function"
        )
    return plugins.load(target, "reward.functions")
