"""What a Llama is (architecture) and how it is run (dtypes, attention backend, remat), in one hashable record."""

import dataclasses
import difflib
from typing import Any, Literal

from jaxreason.errors import UserError
from jaxreason.types import MAX_SEGMENTS

Remat = Literal["none", "full", "attention", "matmuls"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rescaling of the rotary frequencies: ``llama3`` (Llama 3.1 and later) or ``linear``."""

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    max_positions: int = 131072
    init_std: float = 0.02
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    # how it is run
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    attention: Literal["auto", "cudnn", "blockwise", "reference"] = "auto"
    remat: Remat = "none"
    scan_layers: bool = True  # False: training programs with every layer written out, faster and longer to compile
    max_segments: int = MAX_SEGMENTS  # of a packed row, its padding included; what the cudnn backend is compiled for

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "each kv head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs of channels")

    def replace(self, **changes) -> "LlamaConfig":
        return dataclasses.replace(self, **changes)


_LLAMA32_ROPE = RopeScaling("llama3", factor=32.0)

PRESETS: dict[str, LlamaConfig] = {
    # The default of configs/sft.yaml: Llama-3.2's shape in every feature, small enough for two CPU cores.
    "embedded-tiny": LlamaConfig(
        vocab_size=384, embed_dim=128, mlp_dim=384, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, init_std=0.06,
        rope_scaling=_LLAMA32_ROPE,
    ),
    "llama3.2-1b": LlamaConfig(
        vocab_size=128256, embed_dim=2048, mlp_dim=8192, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
        rope_scaling=_LLAMA32_ROPE, bos_id=128000, stop_ids=(128001, 128008, 128009),
    ),
    "llama3.2-3b": LlamaConfig(
        vocab_size=128256, embed_dim=3072, mlp_dim=8192, num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128,
        rope_scaling=_LLAMA32_ROPE, bos_id=128000, stop_ids=(128001, 128008, 128009),
    ),
    "llama3.1-8b": LlamaConfig(
        vocab_size=128256, embed_dim=4096, mlp_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        rope_scaling=RopeScaling("llama3", factor=8.0), tie_embeddings=False,
        bos_id=128000, stop_ids=(128001, 128008, 128009),
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, embed_dim=576, mlp_dim=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        rope_theta=100000.0, max_positions=8192, bos_id=1, stop_ids=(2,),
    ),
}  # fmt: skip


def preset(name: str, overrides: dict[str, Any] | None = None) -> LlamaConfig:
    """The named architecture with some fields changed. Raises UserError for unknown names and fields."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"model.preset {name!r} is unknown{hint}; known: {', '.join(PRESETS)}")
    fields = {field.name: field.type for field in dataclasses.fields(LlamaConfig)}
    for key, value in (overrides or {}).items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"model.overrides.{key}: no such field of the architecture{hint}")
        wanted = type(getattr(PRESETS[name], key))
        if wanted in (int, float, bool) and (isinstance(value, bool) != (wanted is bool) or not isinstance(value, (int, wanted))):
            raise UserError(f"model.overrides.{key} is {value!r}; it is a {wanted.__name__}")
    overrides = dict(overrides or {})
    if overrides.get("max_segments", MAX_SEGMENTS) < MAX_SEGMENTS:
        raise UserError(f"model.overrides.max_segments is below {MAX_SEGMENTS}, which packed rows have; leave it out")
    if isinstance(overrides.get("rope_scaling"), dict):
        try:
            overrides["rope_scaling"] = RopeScaling(**overrides["rope_scaling"])
        except TypeError as error:
            raise UserError(f"model.overrides.rope_scaling: {error}") from None
    if "stop_ids" in overrides:
        overrides["stop_ids"] = tuple(overrides["stop_ids"])
    return PRESETS[name].replace(**overrides)


def param_count(config: LlamaConfig) -> int:
    """Number of parameters; a tied head counts once."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = c.embed_dim * (q + 2 * kv) + q * c.embed_dim
    attention += (q + 2 * kv + c.embed_dim) if c.attention_bias else 0
    mlp = 3 * c.embed_dim * c.mlp_dim + ((2 * c.mlp_dim + c.embed_dim) if c.mlp_bias else 0)
    tables = c.vocab_size * c.embed_dim * (1 if c.tie_embeddings else 2)
    return c.num_layers * (attention + mlp + 2 * c.embed_dim) + c.embed_dim + tables
