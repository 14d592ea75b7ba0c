"""Qwen2 and Qwen2.5 (arXiv 2412.15115), R1-Distill-Qwen: Llama's block with biases on q, k and v."""

import dataclasses
from typing import ClassVar

from jaxreason.model.blocks import FUSED, HF_FIXED, HF_TABLE, Block
from jaxreason.model.config import Architecture, ModelConfig
from jaxreason.model.families.family import Family, HfFormat


@dataclasses.dataclass(frozen=True)
class Qwen2(Architecture):
    family: ClassVar[str] = "qwen2"

    rope_theta: float = 1000000.0
    norm_eps: float = 1e-6


def _layer(config: ModelConfig, name: str | None = None) -> Block:
    return Block(config, qkv_bias=True, name=name)


FAMILY = Family(
    Qwen2,
    _layer,
    FUSED,
    HfFormat(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        table=HF_TABLE,
        flags={},
        fixed=HF_FIXED,  # sliding_window may have any value: without use_sliding_window it is not read
        written={"use_sliding_window": False},
        defaults={
            "num_key_value_heads": 32,
            "head_dim": None,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        even_width=False,
    ),
)
