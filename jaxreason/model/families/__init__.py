"""The architectures, one file each: record, layer, what decoding fuses, Hugging Face form. One more is a file and a line."""

from typing import Any

from jaxreason.model.config import Execution, ModelConfig, split
from jaxreason.model.families import llama, qwen2, qwen3
from jaxreason.model.families.family import Family, HfFormat

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
}


def family_of(config: ModelConfig) -> Family:
    """The family of a config."""
    return FAMILIES[config.arch.family]


def make_config(family: str = "llama", **fields: Any) -> ModelConfig:
    """A config from fields of both of its records by name. Raises TypeError for a name that neither record has."""
    arch, run = split(fields)
    return ModelConfig(FAMILIES[family].architecture(**arch), Execution(**run))


__all__ = ["FAMILIES", "Family", "HfFormat", "family_of", "make_config"]
