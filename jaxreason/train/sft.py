"""Supervised fine-tuning: one flat loop from config to summary.json."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxreason import config as cfg
from jaxreason import losses, rewards
from jaxreason.checkpoint import Checkpoints, write_json
from jaxreason.data.batches import loader
from jaxreason.data.pipeline import Prepared, prepare
from jaxreason.data.prompts import Prompts
from jaxreason.errors import UserError
from jaxreason.model import LlamaConfig, param_count, unstack
from jaxreason.model.cudnn import segment_bound
from jaxreason.rollout import Engine, Sampling
from jaxreason.sharding import batch_sharding, check_batch, make_mesh, replicated, within
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.evaluation import evaluate
from jaxreason.train.measure import Meter, Trace, segment_lengths
from jaxreason.train.run import Interrupt, Log, RunDir, check_finite, console, gib, show_table
from jaxreason.train.setup import Setup, held_out_problems, open_model, open_teacher, put
from jaxreason.train.step import OF_FROZEN, Noise, batch_loss, make_train_step
from jaxreason.types import Batch, Totals
from jaxreason.weights import Source

SHOWN = ("loss", "eval_loss", "tokens_per_second", "eval_accuracy")


def train(config: cfg.SftConfig, dry_run: bool = False) -> dict | None:
    """Runs the config, or resumes it, and returns its summary. Raises UserError for everything a user can mend."""
    # ---- inputs: nothing here starts a device
    setup: Setup = open_model(config.model)
    loss = find_loss(config)
    compared = _compared_with(config, loss, setup)
    run = RunDir(config)
    resume = run.resumable()
    data = prepare(config.data, setup.tokenizer, config.run.seed, progress=not console.quiet)
    problems = held_out_problems(config, setup, data.chat)
    console.print(data.report.table())
    rows, batch_size = data.train, config.data.batch_size
    total = config.train.steps or rows.num_steps(config.train.epochs)
    if resume is not None and resume >= total and (done := run.summary()):
        console.print(f"{run.path} is finished ({total} steps); delete it or set run.name to train again")
        return done
    trace = Trace(run.path / "profile", config.train.profile_steps, total)
    micro = config.train.microbatch_size or batch_size
    segments = max(part.max_segments(total) for part in (rows, data.eval) if part)
    model = setup.config.replace(max_segments=segment_bound(segments))

    # ---- devices
    mesh = make_mesh(config.mesh)
    run.agree(resume, total)
    check_batch(batch_size, micro, mesh)
    schedule = opt.schedule(config.optimizer, total)
    optimizer = opt.make(config.optimizer, total)
    abstract = states.abstract(model, optimizer, mesh)
    shape = jax.ShapeDtypeStruct((batch_size, rows.length), jnp.int32, sharding=batch_sharding(mesh))
    floats = jax.ShapeDtypeStruct(shape.shape, jnp.float32, sharding=shape.sharding)
    batch_shape = Batch(
        shape, shape, shape, shape, floats, sequence_ids=shape, token_weights=None if rows.weights is None else floats
    )
    alpha = config.train.neftune_alpha
    noise = None if alpha is None else Noise(alpha, config.run.seed)
    step_fn = make_train_step(
        model, loss, optimizer, schedule, batch_size // micro, frozen_config=compared and compared.config, noise=noise
    )
    frozen_shape = states.abstract(compared.config, optimizer, mesh).params if compared else None
    with jax.set_mesh(mesh):
        started = time.monotonic()
        out = (jax.tree.map(lambda s: s.sharding, abstract), replicated(mesh))
        train_step = jax.jit(step_fn, donate_argnums=0, out_shardings=out).lower(abstract, batch_shape, frozen_shape).compile()
    state_bytes = _bytes(abstract)
    memory = train_step.memory_analysis()
    show_table("model", [
        ("parameters", f"{param_count(model):,} ({model.num_layers} layers x {model.embed_dim})"),
        ("weights from", config.model.weights or f"random, seed {config.run.seed}"),
        ("dtypes", f"{model.param_dtype} weights, {model.compute_dtype} matmuls, {config.optimizer.moment_dtype} moments"),
        ("loss", f"{config.loss.name} {config.loss.options or ''}"),
        *([("compared with", f"{compared.name}, {gib(_bytes(frozen_shape))} kept on the devices")] if compared else []),
        ("batch", f"{batch_size} rows x {rows.length} tokens, {batch_size // micro} microbatches"),
        ("steps", f"{total} ({rows.steps_per_epoch()} an epoch)"),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())),
        ("state", f"{gib(state_bytes)}; a checkpoint takes as much disk, {config.train.keep_checkpoints} are kept"),
        ("step's memory", f"{gib(memory.temp_size_in_bytes)} beside the state, per device"),
        ("compiled in", f"{time.monotonic() - started:.1f} s"),
    ])  # fmt: skip
    if dry_run:
        for text in data.preview(3):
            console.print(text)
        return None

    # ---- state: restored, loaded or random
    run.start(resume or 0)
    checkpoints = Checkpoints(run.checkpoints, config.train.keep_checkpoints)
    for path in checkpoints.remove_unfinished():
        console.print(f"removed {path}: its writing was cut off, so it was never a checkpoint")
    if jax.process_index() == 0:
        setup.tokenizer.save(run.path / "tokenizer", data.chat.template)
        write_json(run.path / "data_report.json", data.report.to_dict())
    batches = loader(rows, total, process_index=jax.process_index(), process_count=jax.process_count())
    if resume is not None:
        console.print(f"resuming {run.path} from step {resume}")
        state, data_state = checkpoints.restore(resume, abstract)
        batches.set_state(data_state)
    elif setup.source:
        state = states.adopt(setup.source.params(model, mesh), model, optimizer, mesh)
    else:
        state = states.create(model, optimizer, mesh, config.run.seed)
    held_out, meter = Evaluator(config, setup, data, problems, model, mesh), Meter(model, jax.local_devices())
    frozen = None
    if compared and compared.source:
        frozen = compared.source.params(compared.config, mesh)
    elif compared:
        frozen = states.create(compared.config, optimizer, mesh, config.run.seed).params

    # ---- the loop
    log, interrupt = Log(run, config, total, int(state.step), SHOWN), Interrupt()
    began, trained, record = time.monotonic(), 0.0, {}
    try:
        for step in range(int(state.step) + 1, total + 1):
            clock = time.monotonic()
            trace.before(step)
            batch = next(batches)
            state, metrics = train_step(state, put(batch, mesh), frozen)
            metrics = jax.device_get(metrics)
            check_finite(step, metrics, state.params)
            metrics.pop("leaf_norms")
            seconds = time.monotonic() - clock
            trace.after(step)
            trained += float(metrics["tokens"])
            record = metrics | {"seconds": seconds, "tokens_per_second": rows.length * batch_size / seconds}
            record |= meter(segment_lengths(batch.segment_ids), seconds)
            last = interrupt.agreed() or step == total
            if step == total or (config.train.eval_every and step % config.train.eval_every == 0):
                record |= held_out(state.params)
            log.write(step, record)
            checkpoints.check()
            if last or (config.train.save_every and step % config.train.save_every == 0):
                checkpoints.save(state, batches.get_state(), model)
            if last:
                break
        checkpoints.wait()
    finally:
        trace.close()
        log.close()
        interrupt.restore()
    if step < total:
        console.print(f"stopped at step {step} and saved it; the same command goes on")
        return None
    summary = {"step": total, **{k: float(v) for k, v in record.items()}, "trained_tokens": trained,
               "train_seconds": time.monotonic() - began, "parameters": param_count(model)}  # fmt: skip
    run.finish(summary)
    return summary


def find_loss(config: cfg.SftConfig) -> losses.Loss:
    """The config's loss, checked on a tiny batch. Raises UserError."""
    loss = losses.get(config.loss.name, kind="sft", **config.loss.options)
    losses.check(loss)
    name, teacher = config.loss.name, config.teacher.weights
    if "teacher_divergence" in loss.needs and loss.divergence is None:
        raise UserError(f"loss.name {name} reads teacher_divergence, which belongs to forward_kl, reverse_kl and jsd")
    if "teacher_divergence" in loss.needs and teacher is None:
        raise UserError(f"loss.name {name} distils a teacher: set teacher.weights")
    if teacher is not None and "teacher_divergence" not in loss.needs:
        raise UserError(f"teacher.weights {teacher}: loss.name {name} reads no teacher; use forward_kl, reverse_kl or jsd")
    weighted = (config.data.think_weight, config.data.answer_weight) != (1.0, 1.0)
    if weighted and ":" in name and "token_weights" not in loss.needs:
        raise UserError(f"data.think_weight, data.answer_weight: {name} does not read inputs.token_weights")
    return loss


@dataclasses.dataclass(frozen=True)
class _Compared:
    """The frozen model of a loss: the teacher, or the reference, which is what the run starts from."""

    name: str
    config: LlamaConfig
    source: Source | None  # None: the seed's random weights


def _compared_with(config: cfg.SftConfig, loss: losses.Loss, setup: Setup) -> _Compared | None:
    if "teacher_divergence" in loss.needs:
        return _Compared(f"teacher {config.teacher.weights}", *open_teacher(config.teacher.weights, setup))
    if loss.needs.isdisjoint(OF_FROZEN):
        return None
    half = setup.config.replace(param_dtype=setup.config.compute_dtype)
    return _Compared("the starting weights", half, setup.source)


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Evaluator:
    """Held-out loss (nll per trained token) and held-out accuracy of the current parameters."""

    def __init__(
        self, config: cfg.SftConfig, setup: Setup, data: Prepared, problems: Prompts | None, model: LlamaConfig, mesh
    ):
        self._rows, self._problems, self._mesh, self._tokenizer = data.eval, problems, mesh, setup.tokenizer
        nll = losses.get("nll")
        one = Totals(*(jnp.ones(()),) * 3)
        loss: Callable = jax.jit(lambda params, batch: batch_loss(params, model, nll, batch, one)[0])
        self._loss = within(mesh, loss)
        self._unstack = jax.jit(lambda params: unstack(params, model), out_shardings=replicated(mesh))
        if problems:
            self._grader = rewards.get(config.eval.grader)
            sampling = Sampling(temperature=0.0, max_completion_tokens=config.eval.max_completion_tokens)
            self._engine = Engine(model, setup.tokenizer.stop_ids, sampling, slots=config.eval.slots)

    def __call__(self, params: dict) -> dict[str, float]:
        found = {}
        if self._rows:
            loss = tokens = 0.0
            for index in range(self._rows.num_steps()):
                batch = put(self._rows.batch(index, jax.process_index(), jax.process_count()), self._mesh)
                tokens += float(jnp.sum(batch.loss_mask))
                loss += float(self._loss(params, batch))
            found |= {"eval_loss": loss / tokens, "eval_tokens": tokens}
        if self._problems:
            metrics, _ = evaluate(self._engine, self._unstack(params), self._problems, self._tokenizer, self._grader)
            found |= {f"eval_{name}": value for name, value in metrics.items()}
        return found
