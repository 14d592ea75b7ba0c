"""What the rest of the package asks of an architecture."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from jaxreason.model.config import Architecture, ModelConfig

Rows = tuple[tuple[str, tuple[str, ...], bool], ...]


@dataclasses.dataclass(frozen=True)
class HfFormat:
    """What is particular to a family in Hugging Face's files.

    Args:
      model_type: of ``config.json``.
      architecture: the class of transformers that opens it.
      table: (name of the tensor there, path of our leaf, transposed there?); ``{}`` in the name counts layers.
      flags: true-or-false keys of ``config.json`` and our fields of the same meaning.
      fixed: keys with the one value that this family implements, and advice for another; absent keys have that value.
      written: further keys that ``config.json`` is written with.
      defaults: what transformers takes for an absent key, for keys where the families differ: ``head_dim`` and
        ``num_key_value_heads`` (None: what the width and the heads say), ``max_position_embeddings``, ``bos_token_id``,
        ``eos_token_id``.
      even_width: whether transformers refuses a ``hidden_size`` that is not a multiple of the heads.
    """

    model_type: str
    architecture: str
    table: Rows
    flags: Mapping[str, str]
    fixed: Mapping[str, tuple[Any, str]]
    written: Mapping[str, Any]
    defaults: Mapping[str, Any]
    even_width: bool


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
      architecture: its record of sizes.
      layer: ``(config, name) -> module``, one block with the call of :class:`jaxreason.model.blocks.Block`.
      fused: path of a module in the layer → groups of its Dense children that multiply the same input. Decoding stores
        each group as one kernel (:func:`jaxreason.model.unstack`); everything that is in no group stays as it is.
      hf: its form in Hugging Face's files.
    """

    architecture: type[Architecture]
    layer: Callable[[ModelConfig, str | None], nn.Module]
    fused: Mapping[str, tuple[tuple[str, ...], ...]]
    hf: HfFormat
