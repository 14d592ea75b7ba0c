"""Llama 2 and 3 (arXiv 2407.21783) and what is built like them: SmolLM2, TinyLlama, R1-Distill-Llama."""

import dataclasses
from typing import ClassVar

from jaxreason.model.blocks import FUSED, HF_FIXED, HF_TABLE, Block
from jaxreason.model.config import Architecture, ModelConfig
from jaxreason.model.families.family import Family, HfFormat


@dataclasses.dataclass(frozen=True)
class Llama(Architecture):
    family: ClassVar[str] = "llama"

    attention_bias: bool = False  # of q, k, v and o
    mlp_bias: bool = False


def _layer(config: ModelConfig, name: str | None = None) -> Block:
    arch = config.arch
    assert isinstance(arch, Llama)
    return Block(config, arch.attention_bias, arch.attention_bias, arch.mlp_bias, name=name)


FAMILY = Family(
    Llama,
    _layer,
    FUSED,
    HfFormat(
        model_type="llama",
        architecture="LlamaForCausalLM",
        table=HF_TABLE,
        flags={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        fixed=HF_FIXED
        | {
            "pretraining_tp": (1, "it only splits matrix products: set it to 1, the weights stay as they are"),
            "sliding_window": (None, "only full causal attention is implemented"),
        },
        written={},
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        even_width=True,
    ),
)
