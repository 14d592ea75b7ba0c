"""The architecture of a config whose weights are not here."""

from pathlib import Path

from jaxreason import config as cfg
from jaxreason.errors import UserError, present
from jaxreason.model import HUB, PRESETS, ModelConfig, preset
from jaxreason.paths import local


def resolve(model: cfg.Model) -> tuple[ModelConfig, str]:
    """The architecture and where it was found, without network and weights. Raises UserError if it is unknown."""
    if model.weights is None:
        found, source = preset(present(model.preset, "model.preset"), model.overrides), f"preset {model.preset}"
    elif local(model.weights, "model.weights").is_dir():
        from jaxreason.weights import locate

        found, source = locate(model.weights).config(model.param_dtype, model.compute_dtype), model.weights
    else:
        name = HUB.get(model.weights) or _named_after(model.weights)
        if name is None:
            raise UserError(
                f"model.weights {model.weights} is not here and its architecture is unknown: add "
                f"model.weights=null model.preset=NAME, with one of {', '.join(PRESETS)}"
            )
        found, source = PRESETS[name], f"preset {name}, for {model.weights}, which is not here"
    run_as = {name: getattr(model, name) for name in ("param_dtype", "compute_dtype", "attention", "remat", "scan_layers")}
    return found.replace(**run_as), source


def teacher(model: cfg.Model, weights: str) -> ModelConfig:
    """The architecture of a teacher, run as the model is. Raises UserError if it is unknown."""
    return resolve(model.model_copy(update={"weights": weights, "preset": None, "overrides": {}}))[0]


def _named_after(weights: str) -> str | None:
    """The preset that a run's or directory's name begins with, e.g. runs/llama3.2-3b-sft."""
    folder = Path(weights).name.lower()
    return max((name for name in PRESETS if folder.startswith(name)), key=len, default=None)
