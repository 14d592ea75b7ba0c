"""The sampler that a config names."""

from jax.sharding import Mesh

from jaxreason import plugins
from jaxreason.errors import UserError
from jaxreason.model import ModelConfig
from jaxreason.sampler.engine import EngineSampler
from jaxreason.sampler.protocol import Sampler

_METHODS = ("load", "release", "generate", "memory_bytes")


def make(name: str, model: ModelConfig, stop_ids: tuple[int, ...], mesh: Mesh) -> Sampler:
    """``engine``, or what your own ``package.module:function`` or ``path/file.py:function`` returns for the same arguments.

    Raises UserError for an unknown name, and for a result that lacks a method of :class:`jaxreason.sampler.Sampler`.
    """
    if name == "engine":
        return EngineSampler(model, stop_ids, mesh)
    if ":" not in name:
        raise UserError(
            f"rollout.sampler {name!r} is unknown; it is engine, or a sampler of your own: package.module:function or "
            "path/file.py:function"
        )
    function = plugins.load(name, "rollout.sampler")
    try:
        found = function(model, stop_ids, mesh)
    except UserError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"rollout.sampler {name}: called with (model, stop_ids, mesh): {what}") from error
    if missing := [method for method in _METHODS if not callable(getattr(found, method, None))]:
        kind = type(found).__name__
        raise UserError(f"rollout.sampler {name}: its {kind} has no method {missing[0]}; it needs {', '.join(_METHODS)}")
    return found
