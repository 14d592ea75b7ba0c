"""Hugging Face directories, in and out: safetensors only, never a pickle, one tensor in memory at a time."""

from jaxreason.hf.config import config_from_hf, config_to_hf
from jaxreason.hf.gguf import check_gguf, save_gguf
from jaxreason.hf.hub import fetch
from jaxreason.hf.peft import load_adapters, peft_tensors, save_adapters
from jaxreason.hf.read import Leaf, Placement, load, read_config, stored_dtype
from jaxreason.hf.write import save

__all__ = [
    "Leaf",
    "Placement",
    "check_gguf",
    "config_from_hf",
    "config_to_hf",
    "fetch",
    "load",
    "load_adapters",
    "peft_tensors",
    "read_config",
    "save",
    "save_adapters",
    "save_gguf",
    "stored_dtype",
]
