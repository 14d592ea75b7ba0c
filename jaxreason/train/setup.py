"""What a run starts from: the architecture, the tokenizer, and where the weights come from."""

import dataclasses

from jaxreason import config as cfg
from jaxreason.data.tokenizer import Tokenizer, load
from jaxreason.errors import UserError
from jaxreason.model import LlamaConfig, preset
from jaxreason.weights import Source, locate


@dataclasses.dataclass(frozen=True)
class Setup:
    config: LlamaConfig
    tokenizer: Tokenizer
    source: Source | None  # None: random weights


def open_model(model: cfg.Model) -> Setup:
    """Reads architecture and tokenizer, no weights. Raises UserError."""
    if model.weights is None:
        source = None
        config = preset(model.preset, model.overrides)
        config = config.replace(param_dtype=model.param_dtype, compute_dtype=model.compute_dtype)
    else:
        source = locate(model.weights)
        config = source.config(model.param_dtype, model.compute_dtype)
    name = model.tokenizer or (source.tokenizer if source else "embedded")
    tokenizer = load(name)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer {name} has {tokenizer.vocab_size} tokens and the model {config.vocab_size}; "
            "set model.tokenizer to the one that belongs to the model"
        )
    # What generation stops at is what training taught it to stop with, and what the export lists.
    stops = tuple(sorted({*config.stop_ids, *tokenizer.stop_ids}))
    config = config.replace(
        attention=model.attention, remat=model.remat, stop_ids=stops, bos_id=config.bos_id or tokenizer.bos_id
    )
    return Setup(config, tokenizer, source)
