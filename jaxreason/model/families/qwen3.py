"""Qwen3, dense (arXiv 2505.09388): Llama's block with an RMS norm of each head of q and k before the rotation."""

import dataclasses
from typing import ClassVar

from jaxreason.model.blocks import FUSED, HF_FIXED, HF_TABLE, Block
from jaxreason.model.config import Architecture, ModelConfig
from jaxreason.model.families.family import Family, HfFormat


@dataclasses.dataclass(frozen=True)
class Qwen3(Architecture):
    family: ClassVar[str] = "qwen3"

    rope_theta: float = 1000000.0
    norm_eps: float = 1e-6


def _layer(config: ModelConfig, name: str | None = None) -> Block:
    return Block(config, qk_norm=True, name=name)


_NORMS = tuple(
    (f"model.layers.{{}}.self_attn.{name}.weight", ("layers", "attention", name, "scale"), False)
    for name in ("q_norm", "k_norm")
)
FAMILY = Family(
    Qwen3,
    _layer,
    FUSED,
    HfFormat(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        table=(*HF_TABLE, *_NORMS),
        flags={},
        # sliding_window may have any value: without use_sliding_window it is not read
        fixed=HF_FIXED | {"attention_bias": (False, "Qwen3 is implemented without biases")},
        written={"use_sliding_window": False, "attention_bias": False},
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        even_width=False,
    ),
)
