"""Runs and checkpoints to Hugging Face directories, and back."""

import dataclasses

from jaxreason import checkpoint, handoff, hf
from jaxreason import config as cfg
from jaxreason.data.tokenizer import load as load_tokenizer
from jaxreason.errors import UserError
from jaxreason.locks import Partial
from jaxreason.model import lora
from jaxreason.paths import local
from jaxreason.sharding import make_mesh
from jaxreason.weights import WeightSource, locate


def to_hf(model: str, out: str, dtype: str | None) -> str:
    """Exports a run's latest checkpoint, or a given one; returns what to tell the user. Raises UserError.

    ``dtype``: of the stored weights; None: :func:`jaxreason.handoff.source_dtype`.
    """
    source = locate(model)
    if source.kind == "hf":
        raise UserError(f"{model} is a Hugging Face directory already; to-hf takes a run or one of its checkpoints")
    saved = checkpoint.read_model(source.path).execution.param_dtype
    config = source.config(saved, "float32")
    stored = dtype or handoff.source_dtype(source)
    params = source.params(config, make_mesh(cfg.Mesh()))
    hf.save(params, config, out, stored, load_tokenizer(source.tokenizer), handoff.card_of(source))
    found = checkpoint.read_adapters(source.path)
    of_rounded = f", merged into the base as it was rounded to {found[0].base}" if found and found[0].base != "param" else ""
    return f"{source.path} -> {out} ({stored}{of_rounded}); open it with transformers.AutoModelForCausalLM.from_pretrained"


def to_gguf(model: str, out: str) -> str:
    """Writes a GGUF file of a model with the embedded tokenizer; returns what to tell the user. Raises UserError."""
    source = locate(model)
    config = source.config("float32", "float32")
    tokenizer = load_tokenizer(source.tokenizer)
    hf.check_gguf(config, out, tokenizer)
    name = source.path.name if source.kind == "hf" else handoff.card_of(source).get("title", source.run.name)
    hf.save_gguf(source.params(config, make_mesh(cfg.Mesh())), config, out, tokenizer, name)
    return f"{source.path} -> {out} (float32); open it with llama.cpp: llama-completion -m {out} --temp 0"


def to_peft(model: str, out: str) -> str:
    """Exports the adapters of a run's latest checkpoint, or a given one; returns what to tell the user. Raises UserError."""
    source = locate(model)
    found = checkpoint.read_adapters(source.path) if source.kind == "checkpoint" else None
    if found is None:
        raise UserError(f"{source.path} holds a whole model; export it by to-hf (to-peft is for runs with lora.rank)")
    adapter, base = found
    config = dataclasses.replace(source.config("float32", "float32"), adapter=adapter)
    adapters, starts = source.adapters(config, make_mesh(cfg.Mesh()))
    if adapter.init == "pissa":  # on the weights as anyone has them it is an adapter of twice the rank
        adapters = lora.on_the_model(adapters, starts)
        config = dataclasses.replace(config, adapter=dataclasses.replace(adapter, rank=2 * adapter.rank, init="kaiming"))
    # A hub id means the same on another machine, the directory where it was found here does not.
    given = cfg.read_run(source.run / "config.yaml").get("model") if (source.run / "config.yaml").is_file() else None
    name = (given or {}).get("weights") or base.path
    opened_as = name if WeightSource.at(base.path).kind == "hf" else f"{base.path} (a run: export it by to-hf)"
    hf.save_adapters(adapters, config, out, name, load_tokenizer(source.tokenizer))
    return f"{source.path} -> {out}; open it with peft.PeftModel.from_pretrained(BASE, {out!r}), BASE being {opened_as}"


def from_hf(model: str, out: str) -> str:
    """Imports a Hugging Face directory as a checkpoint of step 0. Raises UserError; leaves nothing half-written."""
    target = local(out)
    if target.exists():
        raise UserError(f"{out} exists; give another path or remove it")
    directory = hf.fetch(model)
    stored = hf.stored_dtype(directory)
    params, config = hf.load(directory, stored, stored)
    tokenizer = load_tokenizer(str(directory))
    with Partial(target) as partial:
        checkpoint.save_params(partial.path / "checkpoints", params, config)
        tokenizer.save(partial.path / "tokenizer")
        partial.commit()
    return f"{directory} -> {out} ({stored}); use it as model.weights={out}"

