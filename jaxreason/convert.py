"""Runs and checkpoints to Hugging Face directories, and back."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from jaxreason import checkpoint, hf
from jaxreason import config as cfg
from jaxreason.data.tokenizer import load as load_tokenizer
from jaxreason.errors import UserError
from jaxreason.sharding import make_mesh
from jaxreason.weights import WeightSource, locate


def to_hf(model: str, out: str, dtype: str | None) -> str:
    """Exports a run's latest checkpoint, or a given one; returns what to tell the user. Raises UserError."""
    source = locate(model)
    if source.kind == "hf":
        raise UserError(f"{model} is a Hugging Face directory already; to-hf takes a run or one of its checkpoints")
    saved = checkpoint.read_model(source.path).execution.param_dtype
    config = source.config(saved, "float32")
    params = source.params(config, make_mesh(cfg.Mesh()))
    hf.save(params, config, out, dtype or saved, load_tokenizer(source.tokenizer), _card(source))
    return f"{source.path} -> {out} ({dtype or saved}); open it with transformers.AutoModelForCausalLM.from_pretrained"


def from_hf(model: str, out: str) -> str:
    """Imports a Hugging Face directory as a checkpoint of step 0. Raises UserError; leaves nothing half-written."""
    target = Path(out)
    if target.exists():
        raise UserError(f"{out} exists; give another path or remove it")
    directory = hf.fetch(model)
    stored = hf.stored_dtype(directory)
    params, config = hf.load(directory, stored, stored)
    tokenizer = load_tokenizer(str(directory))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        checkpoint.save_params(temporary / "checkpoints", params, config)
        tokenizer.save(temporary / "tokenizer")
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return f"{directory} -> {out} ({stored}); use it as model.weights={out}"


def _card(source: WeightSource) -> dict:
    """What the model card says of the run."""
    card: dict[str, Any] = {}
    if (source.run / "config.yaml").is_file():
        recipe = yaml.safe_load((source.run / "config.yaml").read_text())
        card |= {"base_model": recipe["model"]["weights"] or f"random weights ({recipe['model']['preset']})",
                 "data": recipe["data"]["source"], "recipe": recipe}  # fmt: skip
    if (source.run / "summary.json").is_file():
        card["metrics"] = json.loads((source.run / "summary.json").read_text())
    return card
