"""Supervised fine-tuning: from config to summary.json."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason import losses
from jaxreason.checkpoint import stored_params, write_json
from jaxreason.data.pipeline import Prepared, prepare
from jaxreason.data.prompts import Prompts
from jaxreason.errors import UserError, present
from jaxreason.evaluate.accuracy import evaluate, grading_of
from jaxreason.losses import distill
from jaxreason.model import ModelConfig, param_count
from jaxreason.model.cudnn import segment_bound
from jaxreason.sampler import EngineSampler, Job, Sampling
from jaxreason.sharding import batch_sharding, check_batch, make_mesh, replicated, within
from jaxreason.terminal import Working, console, gib, show_table
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.folder import RunFolder
from jaxreason.train.loop import Loop, Span
from jaxreason.train.measure import Meter, segment_lengths
from jaxreason.train.scoring import moved
from jaxreason.train.setup import (
    Other,
    Setup,
    abstract_batch,
    adapter_rows,
    check_held_out,
    held_out_problems,
    open_model,
    open_teacher,
    put,
    start_state,
    starting_model,
)
from jaxreason.train.step import COMPARED, Noise, abstract_second, batch_loss, make_train_step
from jaxreason.types import Batch, Totals, TrainState

_DISTILLING = ", ".join(distill.DIVERGENCES)
_OF_REFERENCE = frozenset({"ref_logp", "ref_kl"})
SHOWN = {"loss": "loss", "eval_accuracy": "accuracy", "eval_loss": "eval loss", "trained_tokens_per_second": "tok/s"}


def train(config: cfg.SftConfig, dry_run: bool = False) -> dict | None:
    """Runs the config, or resumes it, and returns its summary; None where it was stopped. Raises UserError."""
    # ---- inputs: nothing here starts a device
    folder = RunFolder(config)
    check_held_out(config)
    setup, loss = open_model(config, folder), find_loss(config)
    compared, resolved = compared_with(config, loss, setup)
    data = prepare(config.data, setup.tokenizer, config.run.seed, progress=not console.quiet)
    folder.settle(resolved.model_copy(update={"data": data.fingerprint}))
    problems = held_out_problems(config, setup, data.chat)
    console.print(data.report.table())
    total = config.train.steps or data.num_steps(present(config.train.epochs, "train.epochs"))
    if done := folder.finished(total):
        console.print(f"{folder.path} is finished ({total} steps); delete it or set run.name to train again")
        return done

    # ---- devices: the step is compiled for shapes, before anything is loaded
    mesh, segments = make_mesh(config.mesh), max(part.max_segments(total) for part in (data.train, data.eval) if part)
    model = setup.config.replace(max_segments=segment_bound(segments))
    folder.agree(total)
    optimizer = opt.of_run(config, total)
    abstract = states.abstract(model, optimizer, mesh, config.train.freeze)
    clock = time.monotonic()
    step_of, second_shape = compile_step(config, loss, model, data, compared, abstract, optimizer, mesh, total)
    saved = _bytes((stored_params(abstract, model), abstract.opt_state))
    memory = present(step_of.memory_analysis(), "the memory of XLA's program")
    show_table("model", [
        *_rows_of(config, data, model, mesh, total), *adapter_rows(model, abstract), *_compared_rows(compared, second_shape),
        ("state", f"{gib(_bytes(abstract))}; a checkpoint takes {gib(saved)} of disk, {config.train.keep_checkpoints} are kept"),
        ("step's memory", f"{gib(memory.temp_size_in_bytes)} in addition to the state, per device"),
        ("compiled in", f"{time.monotonic() - clock:.1f} s"),
    ])  # fmt: skip
    if dry_run:
        for text in data.preview(3):
            console.print(text)
        return None

    held_out = HeldOut(config, setup, data, problems, mesh)
    # Random weights know nothing that training could spoil.
    first = config.model.weights is not None
    process = jax.process_index(), jax.process_count()
    with (
        Loop(folder, config, Span(total, 1, SHOWN), model, held_out, evaluate_first=first) as loop,
        data.batches(total, *process) as batches,
    ):
        if jax.process_index() == 0:
            setup.tokenizer.save(folder.path / "tokenizer", data.chat.template)
            write_json(folder.path / "data_report.json", data.report.to_dict())
        state, data_state = loop.restore(
            abstract, lambda: start_state(config, setup, optimizer, mesh), lambda starts: setup.base_params(mesh, starts)
        )
        if data_state is not None:
            batches.set_state(data_state)
        every, meter = config.reference.refresh_every, Meter(model, jax.local_devices())
        second = None if every is None else loop.restore_more("reference", second_shape)
        if second is None and compared is not None and compared.params is not None:
            second = compared.params(mesh)
        ahead = next(batches, None)  # none is left where the last step was saved and its evaluation failed
        for step in loop:
            clock, batch = time.monotonic(), present(ahead, "a batch")
            state, metrics, _ = step_of(state, placed := put(batch, mesh), second)
            data_state = batches.get_state()
            ahead = loop.note(next, batches, None)  # while the devices work
            record = loop.fetch(metrics, state, placed)
            seconds = time.monotonic() - clock
            record |= speeds(seconds, record["tokens"], batch) | meter(segment_lengths(batch.segment_ids), seconds)
            if every is not None and step % every == 0:
                second = moved(present(second, "the reference"), state.model_params, 1.0)
            loop.end(state, record, data_state, functools.partial(dict, {} if every is None else {"reference": second}))
        if jax.process_index() == 0:
            write_json(folder.path / "data_report.json", data.reported(batches))
        return loop.finish()


def speeds(seconds: float, trained: float, batch: Batch[np.ndarray]) -> dict[str, float]:
    """``seconds`` of the step; supervised tokens a second, and tokens of documents (prompts included, padding not)."""
    documents = float((batch.segment_ids > 0).sum()) * jax.process_count()
    return {
        "seconds": seconds,
        "trained_tokens_per_second": trained / seconds,
        "document_tokens_per_second": documents / seconds,
    }


def compile_step(
    config: cfg.SftConfig, loss: losses.Loss, model: ModelConfig, data: Prepared, compared: Other | None,
    abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh, total: int,
) -> tuple[jax.stages.Compiled, dict | None]:  # fmt: skip
    """The compiled step, and the shapes of the parameters of the model that the loss compares with."""
    rows, micro = config.data.batch_size, config.train.microbatch_size or config.data.batch_size
    check_batch(rows, micro, mesh)
    weighted = () if data.train.weights is None else ("token_weights",)
    batch = abstract_batch(rows, data.train.length, mesh, weighted)
    step = make_train_step(
        model, loss, optimizer, opt.schedule(config.optimizer, total), rows // micro,
        second_config=None if compared is None else compared.compared, noise=noise_of(config), seed=config.run.seed,
        skips=config.train.max_skipped_updates is not None,
    )  # fmt: skip
    second = abstract_second(compared.compared if compared else None, mesh)
    out = (jax.tree.map(lambda s: s.sharding, abstract), replicated(mesh), batch_sharding(mesh))
    with jax.set_mesh(mesh), Working("compiling", 1, "the step"):
        return jax.jit(step, donate_argnums=0, out_shardings=out).lower(abstract, batch, second).compile(), second


def noise_of(config: cfg.SftConfig) -> Noise | None:
    """NEFTune's noise, where the config asks for it."""
    return None if config.train.neftune_alpha is None else Noise(config.train.neftune_alpha, config.run.seed)


def _rows_of(config: cfg.SftConfig, data: Prepared, model: ModelConfig, mesh: Mesh, total: int) -> list[tuple[str, str]]:
    rows, run_as = config.data.batch_size, model.execution
    count, an_epoch = rows // (config.train.microbatch_size or rows), data.report.train.steps_per_epoch
    return [
        ("parameters", f"{param_count(model):,} ({model.arch.num_layers} layers x {model.arch.embed_dim})"),
        ("weights from", config.model.weights or f"random, seed {config.run.seed}"),
        ("dtypes", f"{run_as.param_dtype} weights, {run_as.compute_dtype} matmuls, {config.optimizer.moment_dtype} moments"),
        ("loss", f"{config.loss.name} {config.loss.options or ''}"),
        ("batch", f"{rows} rows x {data.train.length} tokens, {count} microbatches"),
        ("steps", f"{total} ({'of a stream' if an_epoch is None else f'{an_epoch} an epoch'})"),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())),
    ]


def _compared_rows(compared: Other | None, shapes: dict | None) -> list[tuple[str, str]]:
    kept = "" if shapes is None else f", {gib(_bytes(shapes))} kept on the devices"
    return [("compared with", f"{compared.name}{kept}")] if compared else []


def find_loss(config: cfg.SftConfig) -> losses.Loss:
    """The config's loss, checked on a tiny batch. Raises UserError."""
    loss = losses.get(config.loss.name, kind="sft", **config.loss.options)
    losses.check(loss)
    losses.check_filled(loss, {})
    name, teacher = config.loss.name, config.teacher.weights
    if "teacher_divergence" in loss.needs and loss.divergence is None:
        raise UserError(f"loss.name {name} reads teacher_divergence, which belongs to {_DISTILLING}")
    if "teacher_divergence" in loss.needs and teacher is None:
        raise UserError(f"loss.name {name} distils a teacher: set teacher.weights")
    if teacher is not None and "teacher_divergence" not in loss.needs:
        raise UserError(f"teacher.weights {teacher}: loss.name {name} reads no teacher; use one of {_DISTILLING}")
    compares = bool(loss.needs & _OF_REFERENCE)
    if config.reference.refresh_every is not None and not compares:
        raise UserError(f"reference.refresh_every: loss.name {name} compares with no reference; leave it null")
    if name == "psft" and config.reference.refresh_every is None:
        raise UserError(
            "loss.name psft moves away from a reference that follows it: set reference.refresh_every (8 in its authors' code); "
            "compared with the start of the run, every token that is learned would lose its gradient for good"
        )
    weighted = (config.data.think_weight, config.data.answer_weight) != (1.0, 1.0)
    if weighted and ":" in name and "token_weights" not in loss.needs:
        raise UserError(f"data.think_weight, data.answer_weight: {name} does not read inputs.token_weights")
    return loss


def compared_with(config: cfg.SftConfig, loss: losses.Loss, setup: Setup) -> tuple[Other | None, cfg.Resolved]:
    """The second model that ``loss`` reads, and what the config's names mean. Raises UserError."""
    if "teacher_divergence" in loss.needs:
        return open_teacher(present(config.teacher.weights, "teacher.weights"), setup)
    return (None if loss.needs.isdisjoint(COMPARED) else starting_model(setup)), setup.resolved


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class HeldOut:
    """Held-out loss (nll of each supervised token) and held-out accuracy of the current parameters."""

    def __init__(self, config: cfg.SftConfig, setup: Setup, data: Prepared, problems: Prompts | None, mesh: Mesh):
        self._rows, self._problems, self._mesh, self._tokenizer = data.eval, problems, mesh, setup.tokenizer
        nll, one, model = losses.get("nll"), Totals(*(jnp.ones(()),) * 3), setup.config
        self._loss = within(mesh, jax.jit(lambda params, batch: batch_loss(params, model, nll, batch, one)[0]))
        if problems:
            self._grading = grading_of(config.eval)
            sampling = Sampling(temperature=0.0, max_completion_tokens=config.eval.max_completion_tokens)
            self._job = Job(sampling, slots=config.eval.slots)
            self._sampler = EngineSampler(model, setup.tokenizer.stop_ids, mesh)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The metrics ``eval_loss``, ``eval_tokens`` and ``eval_*`` of the problems, as far as there are any."""
        found: dict[str, float] = {}
        if self._rows:
            loss = tokens = 0.0
            with Working("held-out loss", count := self._rows.num_steps()) as show:
                for index in range(count):
                    batch = put(self._rows.batch(index, jax.process_index(), jax.process_count()), self._mesh)
                    tokens += float(jnp.sum(batch.loss_mask))
                    loss += float(self._loss(state.model_params, batch))
                    show(index + 1)
            found |= {"eval_loss": loss / tokens, "eval_tokens": tokens}
        if self._problems:
            self._sampler.load(state.model_params, int(state.step))
            metrics, _ = evaluate(self._sampler, self._problems.prompts, self._tokenizer, self._grading, self._job)
            self._sampler.release()
            found |= {f"eval_{name}": value for name, value in metrics.items()}
        return found
