"""GRPO: prompts, completions, rewards, advantages, updates; from config to summary.json."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason import sampler as samplers
from jaxreason.checkpoint import write_json
from jaxreason.data import chat as chats
from jaxreason.data.chat import Chat
from jaxreason.data.prompts import Prompts, PromptStream, load_prompts
from jaxreason.errors import present
from jaxreason.evaluate.accuracy import grading_of
from jaxreason.model import ModelConfig, param_count
from jaxreason.rewards.pool import RewardPool
from jaxreason.rl import turns
from jaxreason.rl.adaptive import Adaptive
from jaxreason.rl.batch import Batcher
from jaxreason.rl.collect import Collector, rollout_job, slots_of
from jaxreason.rl.context import TeacherPrompts, teacher_prompts
from jaxreason.rl.held_out import HeldOut
from jaxreason.rl.objective import Objective, objective_of
from jaxreason.rl.samples import Samples
from jaxreason.rl.sequence import Sequence
from jaxreason.rl.shapes import Shapes, keeps_reference, longest_prompt, minibatches_scored, shapes_of, shares_reference
from jaxreason.sampler.engine.slots import room_here
from jaxreason.sharding import batch_sharding, device_bytes, make_mesh, replicated, within
from jaxreason.terminal import console, gib, show_table
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.ahead import Ahead
from jaxreason.train.folder import RunFolder
from jaxreason.train.loop import Loop, Span
from jaxreason.train.measure import Meter
from jaxreason.train.offload import Shelf
from jaxreason.train.scoring import FrozenModel, ScoringModel, moved
from jaxreason.train.setup import (
    Other,
    Setup,
    adapter_rows,
    check_held_out,
    held_out_problems,
    open_model,
    open_teacher,
    start_state,
    starting_model,
)
from jaxreason.train.step import ITSELF, Compared, abstract_second, make_score, make_sum_of_squares, make_train_step
from jaxreason.types import Batch, TrainState, combine_metrics

SHOWN = {
    "reward": "reward", "eval_accuracy": "accuracy", "completion_tokens": "length", "entropy": "entropy",
    "drawn_tokens_per_second": "tok/s", "sampler_gap_max": "gap",
}  # fmt: skip
_PATIENCE = 5  # steps in a row before a warning


def train(config: cfg.GrpoConfig, dry_run: bool = False) -> dict | None:
    """Runs the config, or resumes it, and returns its summary; None where it was stopped. Raises UserError."""
    # ---- inputs: nothing here starts a device
    folder = RunFolder(config)
    check_held_out(config)
    inputs = open_inputs(config, folder)
    setup, objective, model = inputs.setup, inputs.objective, inputs.setup.config
    problems = held_out_problems(config, setup, inputs.chat)
    updates, per_step = config.train.updates_per_rollout, config.rollout.prompts_per_step
    total = config.train.steps or math.ceil(present(config.train.epochs, "train.epochs") * len(inputs.prompts) / per_step)
    span = Span(total, updates, SHOWN)
    if done := folder.finished(span.all_updates):
        console.print(f"{folder.path} is finished ({total} steps); delete it or set run.name to train again")
        return done

    # ---- devices
    mesh = make_mesh(config.mesh)
    folder.agree(total)
    shapes = shapes_of(
        config, objective.loss, inputs.longest_prompt, mesh, jax.process_count(), context_tokens=inputs.context_tokens
    )
    optimizer = opt.of_run(config, span.all_updates)
    abstract = states.abstract(model, optimizer, mesh, config.train.freeze)
    config = with_slots(config, inputs, shapes, abstract, mesh)
    sampler = samplers.make(config.rollout.sampler, model, setup.tokenizer.stop_ids, mesh)
    show_table("grpo", [
        *inputs.rows(config, shapes, problems, total), *adapter_rows(model, abstract),
        ("KV cache", gib(sampler.memory_bytes(inputs.longest_prompt, rollout_job(config)))),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())),
        ("state", gib(sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(abstract)))),
    ])  # fmt: skip
    if dry_run:
        console.print(f"first prompt: {inputs.prompts[0].text!r}, gold {inputs.prompts[0].gold!r}", markup=False)
        return None
    train_step = compile_step(config, inputs, shapes, optimizer, abstract, mesh, span.all_updates)
    score = compile_score(model, shapes, config.rollout.temperature, mesh)
    held_out = HeldOut(config, sampler, problems, setup.tokenizer, inputs.chat, grading_of(config.eval)) if problems else None
    reward = config.reward
    with (
        Loop(folder, config, span, model, held_out, evaluate_first=True) as loop,
        RewardPool(objective.graders, reward.workers, reward.timeout_s, reward.on_error) as pool,
        Samples(folder.path, setup.tokenizer) as samples,
    ):
        if jax.process_index() == 0:
            setup.tokenizer.save(folder.path / "tokenizer", inputs.chat.template)
            write_json(folder.path / "data_report.json", inputs.prompts.report())
        state, carried = loop.restore(
            abstract, lambda: start_state(config, setup, optimizer, mesh), lambda starts: setup.base_params(mesh, starts)
        )
        reference = restored_reference(config, loop, model, mesh)
        others = scoring_models(config, inputs, score, shapes, mesh, reference)
        teacher = distilled_from(config, inputs, mesh, others)
        stream = PromptStream(inputs.prompts, config.run.seed, config.data.shuffle)
        collect = Collector(config, sampler, stream, setup.tokenizer, inputs.chat, pool, shapes.longest_prompt, objective.greedy)
        squares = compile_squares(model, shapes, config.rollout.temperature, mesh) if objective.squares else None
        told = inputs.teacher_prompts
        scored = minibatches_scored(config, objective.loss)
        batcher = Batcher(config, objective, shapes, mesh, setup.tokenizer.pad_id, score, others, told, squares, scored)
        shelf = Shelf(abstract, config.rollout.offload_state)
        cursor, coefs, watch, meter = 0, Adaptive(config), Watch(config), Meter(model, jax.local_devices())
        if carried is not None:
            cursor = carried["cursor"]
            coefs.restore(carried)
        for step in loop:
            clock, at = time.monotonic(), int(state.step)
            sampler.load(state.model_params, at)
            state = shelf.put(state)
            rollout = collect(step, cursor, at)
            sampler.release()  # the rollout's copy is freed before the update needs the memory
            state = shelf.take(state)
            cursor, update_clock = rollout.cursor, time.monotonic()
            follow_base(model, others, state)
            sequences, batches = batcher(rollout.groups, rollout.second, state.model_params, step, coefs.now)
            reselected, second = functools.partial(batcher.reselected, step), teacher.params() if teacher else None
            own = "old_logp" in shapes.fields and scored < shapes.minibatches
            state, record, learner = update(train_step, state, batches, updates, loop, reselected, second, own)
            del batches, second
            times = rollout.seconds | {"update": time.monotonic() - update_clock} | shelf.seconds
            record |= rollout.metrics | speeds(time.monotonic() - clock, times, record["tokens"] * updates, sequences)
            record |= meter(np.array([s.length for s in sequences]), times["update"], passes=updates / shapes.minibatches)
            record |= coefs.after(record)
            loop.note(samples.write, step, sequences, learner)
            watch(step, record)
            refresh(config, others, state, step)
            loop.end(state, record, {"cursor": cursor} | coefs.state(), functools.partial(kept_reference, config, others))
        return loop.finish()


# ---- the pieces


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads before it starts a device."""

    setup: Setup
    objective: Objective
    chat: Chat
    prompts: Prompts
    longest_prompt: int  # tokens, of either turn
    teacher: Other | None  # None: none, or the policy itself
    teacher_prompts: TeacherPrompts | None  # None: a teacher reads what the policy reads

    @property
    def context_tokens(self) -> int:
        """Most tokens by which a teacher's prompt is longer than the policy's."""
        return self.teacher_prompts.max_more if self.teacher_prompts else 0

    def rows(self, config: cfg.GrpoConfig, shapes: Shapes, problems: Prompts | None, total: int) -> list[tuple[str, str]]:
        """The table at the start."""
        model, rollout, again = self.setup.config, config.rollout, config.second_turn
        return [
            ("parameters", f"{param_count(model):,} ({model.arch.num_layers} layers x {model.arch.embed_dim})"),
            ("weights from", config.model.weights or f"random, seed {config.run.seed}"),
            *(row for source in self.prompts.sources for row in source.table(len(self.prompts.sources) > 1)),
            ("held out", f"{len(problems)} problems" if problems else "none"),
            ("rollout", f"{rollout.prompts_per_step} prompts x {rollout.group_size}, at most "
                        f"{rollout.max_completion_tokens} tokens, {rollout.slots} slots"),
            *([("second turn", f"{again.samples} corrections of each completion, {again.train} trained")] * (again.samples > 0)),
            ("update", f"{config.train.updates_per_rollout} of {shapes.rows} sequences packed in rows of {shapes.row_length} "
                       f"tokens, microbatches of {shapes.microbatch} rows"),
            ("loss", f"{config.loss.name}, advantage {self.objective.estimator.name}, kl {self.objective.kl_coef(config):g} in "
                     f"the {self.objective.placement}"),
            *([("note", self.objective.loss.note)] if self.objective.loss.note else []),
            *([("teacher", self._taught_by(config.teacher))] if config.teacher.weights else []),
            ("rewards", ", ".join(f"{reward.name} x {weight:g}" for reward, weight in self.objective.graders)),
            ("steps", f"{total} ({total * config.train.updates_per_rollout} updates)"),
        ]  # fmt: skip


    def _taught_by(self, settings: cfg.Teacher) -> str:
        name = self.teacher.name if self.teacher else "the policy itself"
        told = f", told the {settings.context} (at most {self.context_tokens} tokens more)" if settings.context else ""
        given = f", {settings.data_fraction:.0%} of the prompts with the rows' own answers" if settings.data_fraction else ""
        return f"{name}{told}, {settings.divergence or 'log-ratio of the sampled tokens'} x {settings.coef:g}{given}"


def open_inputs(config: cfg.GrpoConfig, folder: RunFolder | None = None) -> Inputs:
    """Model, data and objective of a config; with a run's folder, as that run found them when it started. Raises UserError."""
    setup, objective = open_model(config, folder), objective_of(config)
    teacher, resolved = teacher_of(config, setup)
    chat = chats.of_data(config.data, setup.tokenizer)
    prompts = load_prompts(
        config.data, setup.tokenizer, config.run.seed, max_prompt_tokens=config.data.max_prompt_tokens, chat=chat,
        max_reply_tokens=reply_tokens(config),
    )  # fmt: skip
    if folder:
        folder.settle(resolved.model_copy(update={"data": prompts.fingerprint}))
    phrases = turns.phrase_tokens(config.second_turn.phrases, chat, setup.tokenizer)
    longest = longest_prompt(config, max(len(p.ids) for p in prompts.prompts), phrases)
    told = teacher_prompts(config, prompts, chat, setup.tokenizer)
    return Inputs(setup, objective, chat, prompts, longest, teacher, told)


def teacher_of(config: cfg.GrpoConfig, setup: Setup) -> tuple[Other | None, cfg.Resolved]:
    """The teacher, None for none or the policy itself, and what the config's names mean. Raises UserError."""
    if config.teacher.weights == "start":
        return starting_model(setup), setup.resolved
    if config.teacher.weights in (None, "self"):
        return None, setup.resolved
    return open_teacher(present(config.teacher.weights, "teacher.weights"), setup)


def reply_tokens(config: cfg.GrpoConfig) -> int | None:
    """Most tokens of a row's own answer, where the config uses it; None: it does not."""
    if config.teacher.data_fraction or config.rollout.expert:
        return config.rollout.max_completion_tokens
    if config.teacher.context == "solution":
        return config.teacher.max_context_tokens or config.rollout.max_completion_tokens
    return None


def compared_with(config: cfg.GrpoConfig, inputs: Inputs) -> Compared | None:
    """The model whose distributions the loss reads in an update."""
    if config.teacher.divergence is None:
        return None
    return inputs.teacher.config if inputs.teacher else ITSELF


def with_slots(config: cfg.GrpoConfig, inputs: Inputs, shapes: Shapes, abstract: TrainState, mesh: Mesh) -> cfg.GrpoConfig:
    """The config with a number in place of ``rollout.slots: auto``. Raises UserError where nothing fits."""
    kept: list = [] if config.rollout.offload_state else [abstract]
    own = keeps_reference(config, inputs.objective.loss) and not config.kl.offload and not config.lora.rank
    others = [inputs.setup.config] if own else []
    apart = not (config.teacher.offload or shares_reference(config, inputs.objective.loss))
    others += [inputs.teacher.config] if inputs.teacher and apart else []
    kept += [states.abstract_params(model, mesh, model.execution.compute_dtype) for model in others]
    found = slots_of(config, inputs.setup.config, shapes.longest_prompt, room_here(sum(map(device_bytes, kept))))
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"slots": found})})


def compile_step(
    config: cfg.GrpoConfig, inputs: Inputs, shapes: Shapes, optimizer: optax.GradientTransformation,
    abstract: TrainState, mesh: Mesh, updates: int,
) -> Callable:  # fmt: skip
    """The step (``make_train_step``), whose compilation begins now; the state is donated."""
    schedule, second = opt.schedule(config.optimizer, updates), compared_with(config, inputs)
    step = make_train_step(
        inputs.setup.config, inputs.objective.loss, optimizer, schedule, shapes.microbatches, config.rollout.temperature,
        second_config=second, seed=config.run.seed, skips=config.train.max_skipped_updates is not None,
    )  # fmt: skip
    out = (jax.tree.map(lambda s: s.sharding, abstract), replicated(mesh), batch_sharding(mesh))
    other = abstract_second(second, mesh)
    return Ahead(jax.jit(step, donate_argnums=0, out_shardings=out), mesh, abstract, shapes.batch(mesh), other)


def compile_score(model: ModelConfig, shapes: Shapes, temperature: float, mesh: Mesh) -> Callable:
    """The jitted ``(params, batch) -> HeadStats`` of a model."""
    return within(mesh, jax.jit(make_score(model, shapes.microbatches, temperature), out_shardings=batch_sharding(mesh)))


def compile_squares(model: ModelConfig, shapes: Shapes, temperature: float, mesh: Mesh) -> Callable:
    """The jitted ``(params, batch) -> [B, T]`` of a model's sums of squared probabilities."""
    squares = make_sum_of_squares(model, shapes.microbatches, temperature)
    return within(mesh, jax.jit(squares, out_shardings=batch_sharding(mesh)))


def scoring_models(
    config: cfg.GrpoConfig, inputs: Inputs, score: Callable, shapes: Shapes, mesh: Mesh, reference: dict | None = None
) -> dict[str, ScoringModel]:
    """The reference and the teacher, as far as the config has them, by the field of a sequence that each fills.

    ``reference``: its parameters, where it is no longer what the run started from. Beside adapters it has none of its own
    (:func:`follow_base`).
    """
    found = {}
    if keeps_reference(config, inputs.objective.loss):
        start = {} if inputs.setup.config.adapter else inputs.setup.reference_params(mesh) if reference is None else reference
        found["ref_logp"] = ScoringModel(score, start, config.kl.offload)
    if config.teacher.divergence is None and shares_reference(config, inputs.objective.loss):
        found["teacher_logp"] = found["ref_logp"]
    elif config.teacher.divergence is None and inputs.teacher:
        judge = compile_score(inputs.teacher.config, shapes, config.rollout.temperature, mesh)
        found["teacher_logp"] = ScoringModel(judge, weights_of(inputs.teacher, mesh), config.teacher.offload)
    return found


def follow_base(model: ModelConfig, others: dict[str, ScoringModel], state: TrainState) -> None:
    """Beside adapters the reference is what they stand beside: it scores with the state's own frozen parameters.

    Before every update anew, because a step is given the state's arrays and returns others.
    """
    if model.adapter and "ref_logp" in others:
        others["ref_logp"].put(state.frozen)


def weights_of(teacher: Other, mesh: Mesh) -> dict:
    """A teacher's own parameters; the config refuses one that has none."""
    return present(teacher.params, f"the parameters of {teacher.name}")(mesh)


def distilled_from(
    config: cfg.GrpoConfig, inputs: Inputs, mesh: Mesh, others: dict[str, ScoringModel]
) -> FrozenModel | None:
    """The model whose whole distributions an update reads; None: none, or the policy itself.

    ``others``: of :func:`scoring_models`.
    """
    if inputs.teacher is None or config.teacher.divergence is None:
        return None
    if shares_reference(config, inputs.objective.loss):
        return others["ref_logp"]
    return FrozenModel(weights_of(inputs.teacher, mesh), config.teacher.offload)


def restored_reference(config: cfg.GrpoConfig, loop: Loop, model: ModelConfig, mesh: Mesh) -> dict | None:
    """The parameters of a reference that is refreshed, as the checkpoint has them that the run goes on from."""
    if config.kl.refresh_every is None:
        return None
    return loop.restore_more("reference", states.abstract_params(model, mesh, model.execution.compute_dtype))


def refresh(config: cfg.GrpoConfig, others: dict[str, ScoringModel], state: TrainState, step: int) -> None:
    """Moves the reference to the policy after every ``kl.refresh_every`` steps."""
    if config.kl.refresh_every is not None and step % config.kl.refresh_every == 0:
        reference = others["ref_logp"]
        reference.put(moved(reference.params(), state.model_params, config.kl.refresh_weight))


def kept_reference(config: cfg.GrpoConfig, others: dict[str, ScoringModel]) -> dict[str, dict]:
    """What a checkpoint holds of a reference that is refreshed."""
    return {} if config.kl.refresh_every is None else {"reference": others["ref_logp"].params()}


def update(
    train_step: Callable, state: TrainState, batches: list[Batch], updates: int, loop: Loop,
    reselected: Callable[[Batch, dict], Batch] = lambda batch, _: batch, second: dict | None = None, own: bool = False,
) -> tuple[TrainState, dict, list[dict[str, Array]]]:  # fmt: skip
    """``updates`` optimizer steps over the minibatches in turn, and their metrics: means, apart from ``*_max``, ``*_min``,
    over those that were not skipped; ``tokens`` over all. Third, what the first update of each minibatch says by token.

    ``reselected`` gives a batch what a rule of the current policy picks; the first update's is that of the rollout's.
    ``second``: parameters of the model that the loss compares with. ``own``: the first update takes its own log-probs as the
    old ones, which its minibatch then keeps.
    """
    found, by_token = list[dict[str, float]](), list[dict[str, Array]]()
    for number in range(updates):
        batch = batches[number % len(batches)]
        batch = reselected(batch, state.model_params) if number else batch
        state, metrics, tokens = train_step(state, batch, second)
        if number < len(batches):
            # The policy has moved by the second minibatch's update; the log-probs of the one that drew it are in the batch.
            moved = batch.old_logp is not None and not (number == 0 and own)
            by_token.append(tokens | {"logp": batch.old_logp} if moved else tokens)
        found.append(loop.fetch(metrics, state, batch))
        if number == 0 and own:
            batches[0] = dataclasses.replace(batch, old_logp=tokens["logp"])
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one[name] for one in found if name in one]
        values = values if name.endswith(("_max", "_min")) else [value / len(values) for value in values]
        merged[name] = functools.reduce(lambda a, b: float(combine_metrics(name, a, b)), values)
    return state, merged, by_token


def speeds(seconds: float, times: dict[str, float], trained: float, sequences: list[Sequence]) -> dict[str, float]:
    """``seconds`` of the step and of its parts; supervised tokens and drawn tokens (trained or not) a second of the step."""
    drawn = sum(len(s.completion.tokens) for s in sequences if s.drawn) * jax.process_count()
    return {
        **{f"seconds_{name}": value for name, value in times.items()},
        "seconds": seconds,
        "trained_tokens_per_second": trained / seconds,
        "drawn_tokens_per_second": drawn / seconds,
    }


class Watch:
    """Says so when steps teach nothing for a while: completions too short, or groups that all earn the same."""

    def __init__(self, config: cfg.GrpoConfig):
        self._limits = {
            "truncated_fraction": (0.5, f"raise rollout.max_completion_tokens ({config.rollout.max_completion_tokens})"),
            "zero_std_fraction": (
                0.9, "use easier or harder problems, a larger rollout.group_size, or rollout.resample_rounds"
            ),
        }  # fmt: skip
        self._streaks = dict.fromkeys(self._limits, 0)

    def __call__(self, step: int, record: dict[str, float]) -> None:
        for name, (limit, fix) in self._limits.items():
            self._streaks[name] = self._streaks[name] + 1 if record[name] > limit else 0
            if self._streaks[name] == _PATIENCE:
                console.print(f"warning: {name} was above {limit} for {_PATIENCE} steps up to {step}: {fix}")
