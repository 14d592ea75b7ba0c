"""PEFT's adapter directories, in and out: adapter_config.json and adapter_model.safetensors.

A [in, r] and B [r, out] of a layer are lora_A.weight [r, in] and lora_B.weight [out, r] there, DoRA's magnitude [out] is
lora_magnitude_vector, and each name begins with base_model.model. and goes on as the weight's own in Hugging Face files. Of a
table B [V, r] and A [r, D] are lora_B.weight and lora_A.weight of lm_head, and transposed lora_embedding_A and lora_embedding_B
of embed_tokens; one adapter of tied tables is that of embed_tokens with ensure_weight_tying.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxreason.data.directory import check_sums, find, read_json
from jaxreason.errors import UserError, present
from jaxreason.hf.table import flatten, rows, unflatten
from jaxreason.hf.write import all_or_nothing, open_target
from jaxreason.model import Adapter, ModelConfig, full_shapes
from jaxreason.model.lora import LEAVES, TABLES
from jaxreason.paths import local

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_OF_EMBEDDING = {"lora_a": "lora_embedding_B", "lora_b": "lora_embedding_A"}
# Keys of adapter_config.json that ask for what is not implemented here, unless they have one of these values.
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False,), "modules_to_save": (None, []),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "layers_to_transform": (None,), "layer_replication": (None,),
    "use_qalora": (False,), "lora_bias": (False,), "trainable_token_indices": (None,), "target_parameters": (None, []),
}  # fmt: skip


def save_adapters(adapters: dict, config: ModelConfig, path: str, base: str, tokenizer: Any = None) -> None:
    """Writes a directory that ``peft.PeftModel.from_pretrained(base_model, path)`` opens, in float32; all of it or nothing.

    Args:
      adapters: leaves stacked over layers, as the train state has them; ``config.adapter`` says what they are.
      base: the model that they belong to, for ``base_model_name_or_path``.
      tokenizer: with ``save(directory)``; None: none is written.

    Raises: UserError if ``path`` holds anything or the disk is too small.
    """
    adapter = config.adapter
    assert adapter is not None
    target, tensors = open_target(path), peft_tensors(adapters, config)
    with all_or_nothing(target, sum(value.nbytes for value in tensors.values())) as directory:
        save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
        (directory / _CONFIG).write_text(json.dumps(_config(adapter, config, base), indent=2) + "\n")
        (directory / "README.md").write_text(_card(adapter, base), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(directory)


def peft_tensors(adapters: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """The adapters, or anything shaped like them, by PEFT's names and in its layout, in float32."""
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(adapters).items()}
    return {each.name: np.ascontiguousarray(each.turned(leaves[each.path][each.layer])) for each in _tensors(config)}


def load_adapters(path: str, config: ModelConfig) -> dict[str, Any]:
    """The adapters of a PEFT directory as numpy arrays stacked over layers, of the kind that ``config.adapter`` says.

    Raises UserError for a directory whose rank, scale, kind or tensors are others, or that asks for more than this.
    """
    adapter = config.adapter
    assert adapter is not None
    directory = local(path, "lora.weights")
    where, file = find(directory, _CONFIG), find(directory, _WEIGHTS)
    if where is None or file is None:
        raise UserError(f"{directory} has no {_CONFIG if where is None else _WEIGHTS}; give a directory that PEFT saved")
    check_sums(directory, lambda name: name in (_CONFIG, _WEIGHTS))
    _check(read_json(where), config, where)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); download or save it again") from None
    shapes = flatten(full_shapes(config))
    found: dict[tuple[str, ...], Any] = {}
    for each in _tensors(config):
        name, shape = each.name, shapes[each.path].shape
        stack = found.setdefault(each.path, np.empty(shape, np.float32))
        place = each.turned(stack[each.layer])
        if name not in tensors:
            raise UserError(f"{file} lacks {name}: lora.targets are {', '.join(adapter.targets)}; name those that it has")
        value = tensors.pop(name)
        if value.shape != place.shape:
            raise UserError(f"{file}: {name} is {list(value.shape)}, but the model and lora.rank make it {list(place.shape)}")
        if not np.isfinite(value.astype(np.float32)).all():
            raise UserError(f"{file}: {name} holds NaN or infinite values; the adapter is damaged")
        place[...] = value
        tensors.pop(f"{each.module}.base_layer.weight", None)  # PEFT adds the model's own table to the adapter of one
    if _tied(config):
        _drop_copies(tensors, found, file)
    if tensors:
        named = ", ".join(adapter.targets)
        raise UserError(f"{file} has {min(tensors)}, which is no adapter of lora.targets ({named}); name all that it has")
    return unflatten(found)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One of the file: the module that it belongs to and its own part of the name, our leaf, and which part of that it is."""

    module: str
    suffix: str
    path: tuple[str, ...]
    layer: int | EllipsisType = ...  # of a leaf that is stacked over layers
    transposed: bool = True  # there

    @property
    def name(self) -> str:
        return f"{self.module}.{self.suffix}"

    def turned(self, value: np.ndarray) -> np.ndarray:
        return value.T if self.transposed else value


def _tensors(config: ModelConfig) -> Iterator[_Tensor]:
    """Every tensor of the file."""
    wanted = {path for path in flatten(full_shapes(config)) if path[-1] in LEAVES}
    for pattern, path, _, _ in rows(config):
        module = "base_model.model." + pattern.removesuffix(".weight")
        for leaf in LEAVES:
            if path[-1] == "kernel" and (own := (*path[:-1], leaf)) in wanted:
                for layer in range(config.arch.num_layers):
                    yield _Tensor(module.format(layer), _SUFFIX[leaf], own, layer)
            elif (own := (TABLES.get(path[-1], ""), leaf)) in wanted:
                embedding = path[-1] == "embedding"
                yield _Tensor(module, (_OF_EMBEDDING if embedding else _SUFFIX)[leaf], own, transposed=embedding)


def _config(adapter: Adapter, config: ModelConfig, base: str) -> dict[str, Any]:
    alpha = adapter.scale * adapter.rank
    modules = sorted({each.module.split(".")[-1] for each in _tensors(config)})
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": adapter.rank, "lora_alpha": round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha,
        "use_rslora": False, "use_dora": adapter.kind == "dora", "target_modules": modules, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "ensure_weight_tying": _tied(config),
    }  # fmt: skip


def _tied(config: ModelConfig) -> bool:
    """Whether one adapter changes both of two tied tables."""
    return config.arch.tie_embeddings and "embedding" in present(config.adapter, "ModelConfig.adapter").targets


def _drop_copies(tensors: dict[str, np.ndarray], found: dict[tuple[str, ...], np.ndarray], file: Path) -> None:
    """Takes out what PEFT adds for the head of tied tables: the same adapter again. Raises UserError if it is another."""
    head = "base_model.model.lm_head."
    tensors.pop(head + "base_layer.weight", None)
    for leaf in ("lora_a", "lora_b"):
        copy = tensors.pop(head + _SUFFIX[leaf], None)
        if copy is not None and not np.array_equal(copy.astype(np.float32), found[TABLES["embedding"], leaf]):
            raise UserError(f"{file}: lm_head has an adapter of its own, but this model's tables are one; train them tied")


def _check(values: dict, config: ModelConfig, where: Path) -> None:
    """Raises UserError where adapter_config.json says other than the config, or asks for what is not here."""
    adapter = present(config.adapter, "ModelConfig.adapter")
    if _tied(config) and not values.get("ensure_weight_tying"):
        raise UserError(
            f"{where}: it changes the embedding but not the head, which are one table of this model (ensure_weight_tying is not "
            "set); train it with ensure_weight_tying=True, or without embed_tokens"
        )
    for key, allowed in _FIXED.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{where}: {key} is {values[key]!r}, which is not implemented; only {allowed[0]!r} is")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if rank != adapter.rank:
        raise UserError(f"{where}: r is {rank}, and lora.rank is {adapter.rank}; set lora.rank={rank}")
    kind = "dora" if values.get("use_dora") else "lora"
    if kind != adapter.kind:
        raise UserError(f"{where} is of kind {kind} (use_dora), and lora.kind is {adapter.kind}; set lora.kind={kind}")
    scaling = "sqrt_rank" if values.get("use_rslora") else "rank"
    if not isinstance(alpha, (int, float)):
        raise UserError(f"{where}: lora_alpha is {alpha!r}, which is no number; download or save the adapter again")
    scale = alpha / (adapter.rank**0.5 if values.get("use_rslora") else adapter.rank)
    if abs(scale - adapter.scale) > 1e-6 * adapter.scale:
        raise UserError(
            f"{where}: its adapters are scaled by {scale:g}, and those of this config by {adapter.scale:g}; set "
            f"lora.alpha={alpha} and lora.scaling={scaling}"
        )


def _card(adapter: Adapter, base: str) -> str:
    return (
        "---\nlibrary_name: peft\ntags: [jaxreason, reasoning, lora]\n---\n\n# Adapter\n\n"
        f"A {adapter.kind} adapter of rank {adapter.rank} (scale {adapter.scale:g}) on {', '.join(adapter.targets)}, trained "
        "with jaxreason. It holds no weights of the model that it belongs to:\n\n"
        f"    peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained({base!r}), DIRECTORY)\n"
    )
