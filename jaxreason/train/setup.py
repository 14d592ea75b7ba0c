"""What a run starts from: the architecture, the tokenizer, and where the weights come from."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason.data.chat import Chat
from jaxreason.data.pipeline import eval_split
from jaxreason.data.prompts import Prompts, load_prompts
from jaxreason.data.sources import splits_itself
from jaxreason.data.tokenizer import Tokenizer, load
from jaxreason.errors import UserError
from jaxreason.model import LlamaConfig, preset
from jaxreason.sharding import batch_sharding
from jaxreason.types import Batch
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
    bos_id = tokenizer.bos_id if config.bos_id is None else config.bos_id
    config = config.replace(
        attention=model.attention, remat=model.remat, scan_layers=model.scan_layers, stop_ids=stops, bos_id=bos_id
    )
    return Setup(config, tokenizer, source)


def held_out_problems(config: cfg.RunConfig, setup: Setup, chat: Chat) -> Prompts | None:
    """Problems for evaluation: of ``data.eval_source``, or the task's own held-out ones where a program writes it."""
    if not config.eval.problems:
        return None
    source = config.data.eval_source or config.data.source
    if not splits_itself(source) and config.data.eval_source is None:
        raise UserError("eval.problems needs problems with answers that are not trained on: set data.eval_source")
    changes = {"source": source, "split": eval_split(config.data), "max_rows": config.eval.problems}
    return load_prompts(config.data.model_copy(update=changes), setup.tokenizer, config.run.seed, chat=chat)


def put(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows, placed as its part of the global batch."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def open_teacher(weights: str, setup: Setup) -> tuple[LlamaConfig, Source]:
    """A teacher with the student's tokenizer, in the student's compute dtype; reads no weights. Raises UserError."""
    source = locate(weights)
    dtype = setup.config.compute_dtype
    config = source.config(dtype, dtype).replace(attention=setup.config.attention)
    if config.vocab_size != setup.config.vocab_size or load(source.tokenizer).hf.get_vocab() != setup.tokenizer.hf.get_vocab():
        raise UserError(
            f"teacher.weights {weights}: its vocabulary ({config.vocab_size} entries) is not the model's "
            f"({setup.config.vocab_size}); log-probs of tokens compare only where both have the same tokenizer: choose "
            "a teacher of the same family, or train on its text (SFT)"
        )
    return config, source
