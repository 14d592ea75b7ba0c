"""What a run starts from: the architecture, the tokenizer, where the weights come from, and a teacher."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason.data.chat import Chat
from jaxreason.data.pipeline import held_out_source, too_few_rows
from jaxreason.data.prompts import Prompts, load_prompts
from jaxreason.data.sources import splits_itself
from jaxreason.data.tokenizer import Tokenizer, load
from jaxreason.errors import UserError, present
from jaxreason.hf import load_adapters
from jaxreason.model import Adapter, ModelConfig, init, preset, shapes
from jaxreason.model.lora import check as check_adapter
from jaxreason.model.quantized import check as check_base
from jaxreason.sharding import batch_sharding, shardings
from jaxreason.train import state as states
from jaxreason.train.folder import RunFolder
from jaxreason.train.state import start_key
from jaxreason.train.step import BASE, Compared
from jaxreason.types import Batch, TeacherView, TrainState
from jaxreason.weights import WeightSource, locate

_HELD_OUT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Setup:
    """What training starts from; nothing is on a device yet."""

    config: ModelConfig
    tokenizer: Tokenizer
    source: WeightSource | None  # None: random weights
    seed: int  # of the random weights
    resolved: cfg.Resolved  # where the weights were found, and their digest

    def base_params(self, mesh: Mesh, starts: dict) -> dict:
        """What a run's adapters stand beside, as its checkpoints do not hold it. Raises UserError.

        ``starts``: where PiSSA's adapters began, from a checkpoint.
        """
        return present(self.source, "model.weights").params(self.config, mesh, starts)

    def reference_params(self, mesh: Mesh) -> dict:
        """The run's true starting weights in the compute dtype, also where the run is resumed. Raises UserError.

        Random weights are drawn in the parameters' dtype and rounded: drawn in another dtype they would be others.
        """
        half = self.config.replace(param_dtype=self.config.execution.compute_dtype)
        if self.resolved.weights:
            return _pinned(self.resolved.weights, self.resolved.weights_digest, "its reference").params(half, mesh)

        def draw(key: jax.Array) -> dict:
            return jax.tree.map(lambda w: w.astype(half.execution.compute_dtype), init(self.config, key))

        shapes = jax.eval_shape(draw, start_key(self.seed))
        return jax.jit(draw, out_shardings=shardings(shapes, mesh))(start_key(self.seed))


def open_model(config: cfg.RunConfig, folder: RunFolder | None = None) -> Setup:
    """Reads architecture and tokenizer, no weights. Raises UserError.

    ``folder``: of a run. One that is resumed goes on with the weights that its name meant when it started, not with what it
    means today; if they are gone, the run's own newest checkpoint says what the architecture is.
    """
    model = config.model
    resolved = folder.resolved if folder else cfg.Resolved()
    if model.weights is None:
        source = None
        found = preset(present(model.preset, "model.preset"), model.overrides)
        found = found.replace(param_dtype=model.param_dtype, compute_dtype=model.compute_dtype)
    else:
        source = _source(model.weights, folder, resolved, pinned=config.lora.rank is not None)
        found = source.config(model.param_dtype, model.compute_dtype)
        if resolved.weights is None:
            resolved = cfg.Resolved(weights=str(source.path), weights_digest=source.digest())
    name = model.tokenizer or (source.tokenizer if source else "embedded")
    tokenizer = load(name)
    if tokenizer.vocab_size > found.arch.vocab_size:
        raise UserError(
            f"tokenizer {name} has {tokenizer.vocab_size} tokens and the model {found.arch.vocab_size}; "
            "set model.tokenizer to the one that belongs to the model"
        )
    # What generation stops at is what training taught it to stop with, and what the export lists.
    stops = tuple(sorted({*found.arch.stop_ids, *tokenizer.stop_ids}))
    bos_id = tokenizer.bos_id if found.arch.bos_id is None else found.arch.bos_id
    found = found.replace(
        attention=model.attention, remat=model.remat, scan_layers=model.scan_layers, stop_ids=stops, bos_id=bos_id
    )
    found = dataclasses.replace(found, adapter=adapter_of(config.lora, found))
    return Setup(found, tokenizer, source, config.run.seed, resolved)


def adapter_of(lora: cfg.Lora, model: ModelConfig) -> Adapter | None:
    """The adapters that the section asks for. Raises UserError where the model's matrices cannot have them."""
    if lora.rank is None:
        return None
    scale = lora.alpha / (lora.rank if lora.scaling == "rank" else math.sqrt(lora.rank))
    adapter = Adapter(lora.rank, scale, tuple(lora.targets), lora.kind, lora.base, lora.init)
    own = shapes(model)
    check_adapter(own, adapter)
    if adapter.base != "param":
        check_base(own, adapter.base)
    return adapter


def adapter_rows(model: ModelConfig, abstract: TrainState) -> list[tuple[str, str]]:
    """What the table at the start says of adapters."""
    if model.adapter is None:
        return []
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    found = model.adapter
    said = f"{count:,} parameters ({found.kind}, rank {found.rank}, scale {found.scale:g}, {', '.join(found.targets)})"
    kept = "" if found.base == "param" else f", its layers in {found.base}"
    return [("adapters", f"{said}; the rest is frozen{kept}")]


def start_state(config: cfg.RunConfig, setup: Setup, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state of step 0: loaded, or random."""
    model, freeze = setup.config, config.train.freeze
    if setup.source:
        params = setup.source.params(model, mesh)
        adapters = states.draw_adapters(model, params, mesh, setup.seed)
        if config.lora.weights:
            given = load_adapters(config.lora.weights, model)
            adapters = jax.tree.map(jax.device_put, given, shardings(given, mesh))
        return states.adopt(params, model, optimizer, mesh, freeze, adapters)
    return states.create(model, optimizer, mesh, config.run.seed, freeze)


def _pinned(path: str, digest: str | None, needed_for: str) -> WeightSource:
    """The weights that a run found when it started. Raises UserError if they are others now."""
    source = WeightSource.at(path)
    if not source.path.exists() or source.digest() != digest:
        raise UserError(
            f"{path}: the weights that this run found when it started are no longer there (moved, deleted or trained again), "
            f"and {needed_for} is made of them: put them back, or start again under another run.name"
        )
    return source


def _source(weights: str, folder: RunFolder | None, resolved: cfg.Resolved, pinned: bool) -> WeightSource:
    if folder is None or resolved.weights is None:
        return locate(weights)
    if pinned:  # a checkpoint of adapters does not hold them
        return _pinned(resolved.weights, resolved.weights_digest, "what its adapters change")
    if Path(resolved.weights).exists():
        return WeightSource.at(resolved.weights)
    own = locate(str(folder.path))
    return dataclasses.replace(own, held=None)  # the run itself may delete it


def check_held_out(config: cfg.RunConfig) -> None:
    """Raises UserError with all that a config wants to hold out and its data do not have, before anything large is read."""
    lacks = [_no_problems(config), too_few_rows(config.data) if isinstance(config.data, cfg.Data) else None]
    if found := [lack for lack in lacks if lack]:
        raise UserError("; and ".join(found))


def _no_problems(config: cfg.RunConfig) -> str | None:
    data = config.data
    if not config.eval.problems or splits_itself(data.source) or data.eval_source is not None or data.eval_split is not None:
        return None
    return (
        f"eval.problems={config.eval.problems} needs problems with answers that are not trained on: set data.eval_source to "
        "them, or eval.problems=0"
    )


def held_out_problems(config: cfg.RunConfig, setup: Setup, chat: Chat) -> Prompts | None:
    """Problems for evaluation: of ``data.eval_source``, or the task's own held-out ones where a program writes it.

    They are the same for every ``run.seed``, so that runs of several seeds are measured on one set.
    """
    if not config.eval.problems:
        return None
    data = config.data
    if lack := _no_problems(config):
        raise UserError(lack)
    source, split = held_out_source(data)
    changes: dict[str, Any] = {"source": source, "split": split, "max_rows": config.eval.problems, "mixture": []}
    return load_prompts(config.data.model_copy(update=changes), setup.tokenizer, _HELD_OUT_SEED, chat=chat)


def put(batch: Batch[np.ndarray], mesh: Mesh) -> Batch:
    """This process's rows, placed as its part of the global batch."""
    return jax.tree.map(lambda x: place(x, mesh), batch)


def place(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """This process's rows [B, …] of one field as its part of the global array."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), rows)


def abstract_batch(
    rows: int, length: int, mesh: Mesh, floats: Sequence[str] = (), extras: Sequence[str] = (), grouped: bool = False,
    viewed: bool = False,
) -> Batch[jax.ShapeDtypeStruct]:  # fmt: skip
    """A batch [rows, length] of shapes, as a step is compiled for.

    ``floats``: the optional float fields that it has in addition to the mask; ``extras``: names of a loss's own inputs;
    ``grouped``: it has ``group_ids``; ``viewed``: a teacher has a view of its own.
    """
    where = batch_sharding(mesh)
    ints = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=where)
    real = jax.ShapeDtypeStruct((rows, length), np.float32, sharding=where)
    optional: dict[str, Any] = dict.fromkeys(floats, real) | ({"group_ids": ints} if grouped else {})
    if viewed:
        optional["teacher"] = TeacherView(ints, ints, ints, ints, real)
    return Batch(ints, ints, ints, ints, real, sequence_ids=ints, extras=dict.fromkeys(extras, real), **optional)


@dataclasses.dataclass(frozen=True)
class Other:
    """A model that the policy is compared with: a teacher, or what the run started from."""

    name: str
    config: ModelConfig
    params: Callable[[Mesh], dict] | None  # reads its weights onto the devices; None: they are the frozen ones of the state

    @property
    def compared(self) -> Compared:
        """What a step that compares with it is made for."""
        return BASE if self.params is None else self.config


def starting_model(setup: Setup) -> Other:
    """The run's true starting weights; beside adapters they are where they were."""
    if setup.config.adapter:
        return Other("the weights that the adapters began with", dataclasses.replace(setup.config, adapter=None), None)
    half = setup.config.replace(param_dtype=setup.config.execution.compute_dtype)
    return Other("the starting weights", half, setup.reference_params)


def open_teacher(weights: str, setup: Setup) -> tuple[Other, cfg.Resolved]:
    """A teacher with the student's tokenizer, in the student's compute dtype, and where it was found; reads no weights.

    Of a resumed run it is the teacher that the run found when it started. Raises UserError.
    """
    resolved = setup.resolved
    if resolved.teacher:
        source = _pinned(resolved.teacher, resolved.teacher_digest, "its teacher")
    else:
        source = locate(weights)
        resolved = resolved.model_copy(update={"teacher": str(source.path), "teacher_digest": source.digest()})
    dtype = setup.config.execution.compute_dtype
    config = source.config(dtype, dtype).replace(attention=setup.config.execution.attention)
    theirs, ours = config.arch.vocab_size, setup.config.arch.vocab_size
    if theirs != ours or load(source.tokenizer).hf.get_vocab() != setup.tokenizer.hf.get_vocab():
        raise UserError(
            f"teacher.weights {weights}: its vocabulary ({theirs} entries) is not the model's "
            f"({ours}); log-probs of tokens compare only where both have the same tokenizer: choose "
            "a teacher of the same family, or train on its text (SFT)"
        )
    return Other(f"teacher {weights}", config, functools.partial(source.params, config)), resolved
