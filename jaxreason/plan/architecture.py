"""The architecture of a config whose weights are not here."""

from pathlib import Path

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.model import PRESETS, LlamaConfig, preset

# Hub id → preset of the same shape.
HUB = {
    **{f"meta-llama/Llama-3.2-1B{kind}": "llama3.2-1b" for kind in ("", "-Instruct")},
    **{f"meta-llama/Llama-3.2-3B{kind}": "llama3.2-3b" for kind in ("", "-Instruct")},
    **{f"meta-llama/Llama-3.1-8B{kind}": "llama3.1-8b" for kind in ("", "-Instruct")},
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "llama3.1-8b",
    **{f"HuggingFaceTB/SmolLM2-135M{kind}": "smollm2-135m" for kind in ("", "-Instruct")},
}


def resolve(model: cfg.Model) -> tuple[LlamaConfig, str]:
    """The architecture and where it was found, without network and weights. Raises UserError if it is unknown."""
    if model.weights is None:
        found, source = preset(model.preset, model.overrides), f"preset {model.preset}"
    elif Path(model.weights).is_dir():
        from jaxreason.weights import locate

        found, source = locate(model.weights).config(model.param_dtype, model.compute_dtype), model.weights
    else:
        name = HUB.get(model.weights) or _named_after(model.weights)
        if name is None:
            raise UserError(
                f"model.weights {model.weights} is not here and its architecture is unknown: add the words "
                f"model.weights=null model.preset=NAME, with one of {', '.join(PRESETS)}"
            )
        found, source = PRESETS[name], f"preset {name}, for {model.weights}, which is not here"
    names = ("param_dtype", "compute_dtype", "attention", "remat", "scan_layers")
    run_as = {name: getattr(model, name) for name in names}
    return found.replace(**run_as), source


def teacher(model: cfg.Model, weights: str) -> LlamaConfig:
    """The architecture of a teacher, run as the model is. Raises UserError if it is unknown."""
    return resolve(model.model_copy(update={"weights": weights, "preset": None, "overrides": {}}))[0]


def _named_after(weights: str) -> str | None:
    """The preset that a run's or directory's name begins with, e.g. runs/llama3.2-3b-sft."""
    folder = Path(weights).name.lower()
    return max((name for name in PRESETS if folder.startswith(name)), key=len, default=None)
