"""What a network is (:class:`Architecture`) and how it is run (:class:`Execution`), together one hashable record."""

import dataclasses
from typing import Any, ClassVar, Literal

from jaxreason.errors import UserError
from jaxreason.types import MAX_SEGMENTS

Remat = Literal["none", "full", "attention", "matmuls"]
Backend = Literal["auto", "cudnn", "blockwise", "reference"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rescaling of the rotary frequencies: ``llama3`` (Llama 3.1 and later) or ``linear``."""

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What every decoder of ``model/families`` has; a family's own record adds its fields.

    Raises: UserError for heads that cannot be shared evenly and for a head_dim that cannot be rotated.
    """

    family: ClassVar[str]  # the key of the family in ``families.FAMILIES``

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
    max_positions: int = 131072
    init_std: float = 0.02
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "each kv head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs of channels")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network is run: nothing here changes what it computes, rounding apart."""

    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    attention: Backend = "auto"
    remat: Remat = "none"
    scan_layers: bool = True  # False: training programs with every layer written out, faster and longer to compile
    max_segments: int = MAX_SEGMENTS  # of a packed row, its padding included; what the cudnn backend is compiled for


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What low-rank adapters on some Denses and tables are (``model/lora.py``).

    Args:
      rank: r, columns of A and rows of B.
      scale: what A·B is multiplied by.
      targets: names of the Denses that have one, and ``embedding`` and ``head``.
      kind: ``lora``, or ``dora``, which trains the norm of each output's weights apart from their direction.
      base: what the matrices of the layers, those without an adapter too, are kept as beside them (``model/quantized.py``);
        ``param``: as they are, in ``param_dtype``.
      init: ``kaiming``: A drawn and B zero; ``pissa``: the largest singular triplets, which the base then lacks.
    """

    rank: int
    scale: float
    targets: tuple[str, ...]
    kind: Literal["lora", "dora"] = "lora"
    base: Literal["param", "int8", "nf4"] = "param"
    init: Literal["kaiming", "pissa"] = "kaiming"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    arch: Architecture
    execution: Execution = Execution()
    adapter: Adapter | None = None  # None: the network is its own weights alone

    def replace(self, **changes: Any) -> "ModelConfig":
        """The same with fields of architecture or execution changed. Raises TypeError for a name that neither has."""
        arch, run = split(changes)
        return dataclasses.replace(
            self, arch=dataclasses.replace(self.arch, **arch), execution=dataclasses.replace(self.execution, **run)
        )


def split(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields by name: those of the architecture (every name that the other does not have), and those of the execution."""
    run = {name: value for name, value in fields.items() if name in Execution.__dataclass_fields__}
    return {name: value for name, value in fields.items() if name not in run}, run
