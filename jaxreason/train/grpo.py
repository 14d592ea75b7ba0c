"""GRPO: prompts, completions, rewards, advantages, updates; one flat loop from config to summary.json."""

import json
import math
import time

import jax
import numpy as np

from jaxreason import config as cfg
from jaxreason import losses, rewards
from jaxreason.checkpoint import Checkpoints
from jaxreason.data import chat as chats
from jaxreason.data.prompts import load_prompts
from jaxreason.errors import UserError
from jaxreason.losses.policy import adapt_entropy_coef
from jaxreason.model import param_count, unstack
from jaxreason.rewards.pool import RewardPool
from jaxreason.rollout import Engine, sampling_of
from jaxreason.sharding import batch_sharding, check_batch, make_mesh, replicated, within
from jaxreason.train import advantages, correction, minibatch, rollouts
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.collect import Collector
from jaxreason.train.evaluation import GrpoEvaluator
from jaxreason.train.frozen import Frozen
from jaxreason.train.measure import Meter, Trace
from jaxreason.train.rollouts import Sequence, labels
from jaxreason.train.run import Interrupt, Log, RunDir, check_finite, console, gib, show_table
from jaxreason.train.setup import held_out_problems, open_model, open_teacher
from jaxreason.train.step import make_score, make_train_step
from jaxreason.types import combine_metrics

SHOWN = ("reward", "eval_accuracy", "completion_tokens", "entropy", "sampler_gap_max", "tokens_per_second")
_PATIENCE = 5  # steps in a row before a warning


def train(config: cfg.GrpoConfig, dry_run: bool = False) -> dict | None:
    """Runs the config, or resumes it, and returns its summary. Raises UserError for everything a user can mend."""
    # ---- inputs: nothing here starts a device
    setup = open_model(config.model)
    loss = find_loss(config)
    estimate = advantages.estimator(config, loss)
    graders = [(rewards.get(term.name, **term.options), term.weight) for term in config.reward.functions]
    teacher = open_teacher(config.teacher.weights, setup) if config.teacher.weights else None
    run = RunDir(config)
    resume = run.resumable()
    chat = chats.resolve(setup.tokenizer, config.data.template, config.data.system_prompt)
    seed, per_step, group = config.run.seed, config.rollout.prompts_per_step, config.rollout.group_size
    prompts = load_prompts(
        config.data, setup.tokenizer, seed, max_prompt_tokens=config.data.max_prompt_tokens, chat=chat
    )
    problems = held_out_problems(config, setup, chat)
    updates, parts = config.train.updates_per_rollout, config.train.minibatches
    total = config.train.steps or math.ceil(config.train.epochs * len(prompts) / per_step)
    if resume is not None and resume >= total * updates and (done := run.summary()):
        console.print(f"{run.path} is finished ({total} steps); delete it or set run.name to train again")
        return done
    trace = Trace(run.path / "profile", config.train.profile_steps, total)
    model = setup.config

    # ---- shapes: rows of a fixed length, into which sequences are packed
    limit, layers = config.rollout.max_completion_tokens, 1 + config.correction.samples
    longest = max(len(p.ids) for p in prompts.prompts)
    if layers > 1:
        longest = correction.longest_prompt(config, longest, chat, setup.tokenizer)
    rows = per_step * group * layers // parts
    mesh = make_mesh(config.mesh)
    run.agree(resume, total)
    micro = config.train.microbatch_size or minibatch.default_microbatch(rows, mesh)
    check_batch(rows, micro, mesh, "rollout.prompts_per_step x rollout.group_size x layers / train.minibatches")
    if per_step % jax.process_count():
        raise UserError(f"rollout.prompts_per_step {per_step} is not a multiple of the {jax.process_count()} processes")
    count = rows // micro
    layout = rollouts.Layout(
        rollouts.row_length(longest + limit), rows // jax.process_count(), count, setup.tokenizer.pad_id
    )
    schedule = opt.schedule(config.optimizer, total * updates)
    optimizer = opt.make(config.optimizer, total * updates)
    abstract = states.abstract(model, optimizer, mesh)
    temperature = config.rollout.temperature
    slots = -(-config.rollout.slots // jax.process_count())  # an engine's are those of its process
    engine = Engine(model, setup.tokenizer.stop_ids, sampling_of(config.rollout), slots=slots)
    step_fn = make_train_step(model, loss, optimizer, schedule, count, temperature)
    out = (jax.tree.map(lambda s: s.sharding, abstract), replicated(mesh))
    train_step = within(mesh, jax.jit(step_fn, donate_argnums=0, out_shardings=out))
    score = within(mesh, jax.jit(make_score(model, count, temperature), out_shardings=batch_sharding(mesh)))
    to_rollout = jax.jit(lambda params: unstack(params, model), out_shardings=replicated(mesh))
    show_table("grpo", [
        ("parameters", f"{param_count(model):,} ({model.arch.num_layers} layers x {model.arch.embed_dim})"),
        ("weights from", config.model.weights or f"random, seed {seed}"),
        ("problems", f"{len(prompts)} of {prompts.rows} rows" + "".join(f", {n} {r}" for r, n in prompts.dropped.items())),
        ("held out", f"{len(problems)} problems" if problems else "none"),
        ("rollout", f"{per_step} prompts x {group}, at most {limit} tokens, {config.rollout.slots} slots"),
        *([("correction", f"{layers - 1} of each completion, {config.correction.train} trained")] if layers > 1 else []),
        ("KV cache", gib(engine.kv_bytes(longest))),
        ("update", f"{updates} of {rows} sequences packed in rows of {layout.row_length} tokens, "
                   f"microbatches of {micro} rows"),
        ("loss", f"{config.loss.name}, advantage {config.advantage.name or loss.advantage}, "
                 f"kl {config.kl.coef:g} in the {advantages.placement(config, loss)}"),
        *([("teacher", f"{config.teacher.weights} x {config.teacher.coef:g}")] if teacher else []),
        ("rewards", ", ".join(f"{reward.name} x {weight:g}" for reward, weight in graders)),
        ("steps", f"{total} ({total * updates} updates)"),
        ("mesh", " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())),
        ("state", gib(sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(abstract)))),
    ])  # fmt: skip
    if dry_run:
        console.print(f"first prompt: {prompts[0].text!r}, gold {prompts[0].gold!r}", markup=False)
        return None

    # ---- state: restored, loaded or random
    run.start(0 if resume is None else resume // updates)
    checkpoints = Checkpoints(run.checkpoints, config.train.keep_checkpoints)
    for path in checkpoints.remove_unfinished():
        console.print(f"removed {path}: its writing was cut off, so it was never a checkpoint")
    if jax.process_index() == 0:
        setup.tokenizer.save(run.path / "tokenizer", chat.template)
    cursor, bonus = 0, Bonus(config.entropy)
    if resume is not None:
        console.print(f"resuming {run.path} from step {resume // updates}")
        state, data_state = checkpoints.restore(resume, abstract)
        cursor = data_state["cursor"]
        bonus.restore(data_state)
    elif setup.source:
        state = states.adopt(setup.source.params(model, mesh), model, optimizer, mesh)
    else:
        state = states.create(model, optimizer, mesh, seed)
    scored: dict[str, Frozen] = {}  # field of a sequence -> the model that fills it
    if config.kl.coef:
        half = model.replace(param_dtype=model.execution.compute_dtype)
        reference = setup.source.params(half, mesh) if setup.source else states.create(half, optimizer, mesh, seed).params
        scored["ref_logp"] = Frozen(score, reference, config.kl.offload)
        del reference
    if teacher:
        judge = within(mesh, jax.jit(make_score(teacher[0], count, temperature), out_shardings=batch_sharding(mesh)))
        scored["teacher_logp"] = Frozen(judge, teacher[1].params(teacher[0], mesh), config.teacher.offload)
    evaluator = GrpoEvaluator(config, setup, problems, model, chat) if problems else None
    meter = Meter(model, jax.local_devices())

    # ---- the loop
    start = int(state.step) // updates
    log, interrupt, watch = Log(run, config, total, start, SHOWN), Interrupt(), Watch()
    samples = open(run.path / "samples.jsonl", "a") if jax.process_index() == 0 else None
    began, record = time.monotonic(), {}
    pool = RewardPool(graders, config.reward.workers, config.reward.timeout_s, config.reward.on_error)
    collect = Collector(config, engine, prompts, setup.tokenizer, chat, pool)
    try:
        if evaluator and start == 0:
            log.write(0, evaluator(to_rollout(state.params)))
        for step in range(start + 1, total + 1):
            clock = time.monotonic()
            trace.before(step)
            weights, at = to_rollout(state.params), int(state.step)
            rollout = collect(weights, step, cursor, at)
            second = collect.corrections(weights, step, rollout, at, longest) if layers > 1 else []
            del weights  # the rollout's copy is freed before the update needs the memory
            cursor, times = rollout.cursor, rollout.seconds
            update_clock = time.monotonic()
            sequences = [s for group_ in [*rollout.groups, *second] for s in group_]
            for field, frozen in scored.items():
                sequences = minibatch.attach(sequences, field, frozen.score, frozen.params(), layout, mesh, parts)
            sequences = advantages.teach(sequences, rollout.groups, second, estimate, config)
            record = rollouts.metrics_of([s for g in rollout.groups for s in g], labels(pool.names)) | rollout.counts
            if second:
                record |= correction.metrics(sequences, second)
            merged: dict[str, float] = {}
            batches = [
                minibatch.make_inputs(
                    config, loss, [sequences[i] for i in part], score, state.params, mesh, layout, step, bonus.now
                )
                for part in np.array_split(minibatch.order(seed, step, len(sequences), parts), parts)
            ]
            for update in range(updates):
                state, metrics = train_step(state, batches[update % parts])
                metrics = jax.device_get(metrics)
                check_finite(step, metrics, state.params)
                metrics.pop("leaf_norms")
                for name, value in metrics.items():
                    value = float(value) if name.endswith(("_max", "_min")) else float(value) / updates
                    merged[name] = float(combine_metrics(name, merged[name], value)) if name in merged else value
            del batches
            times["update"] = time.monotonic() - update_clock
            seconds = time.monotonic() - clock
            trace.after(step)
            drawn = sum(len(s.completion.tokens) for s in sequences) * jax.process_count()
            record |= merged | {f"seconds_{name}": value for name, value in times.items()}
            record |= {"seconds": seconds, "tokens_per_second": drawn / seconds}
            lengths = np.array([len(s.prompt.ids) + len(s.completion.tokens) - 1 for s in sequences])
            record |= meter(lengths, times["update"], passes=updates / parts)
            record |= bonus.after(merged.get("entropy"))
            last = interrupt.agreed() or step == total
            if evaluator and (step == total or (config.train.eval_every and step % config.train.eval_every == 0)):
                record |= evaluator(to_rollout(state.params))
            if samples:
                write_samples(samples, step, sequences)
            log.write(step, record)
            watch(step, record, config)
            checkpoints.check()
            if last or (config.train.save_every and step % config.train.save_every == 0):
                checkpoints.save(state, {"cursor": cursor} | bonus.state(), model)
            if last:
                break
        checkpoints.wait()
    finally:
        trace.close()
        pool.close()
        log.close()
        interrupt.restore()
        if samples:
            samples.close()
    if step < total:
        console.print(f"stopped at step {step} and saved it; the same command goes on")
        return None
    summary = {"step": total, **record, "train_seconds": time.monotonic() - began, "parameters": param_count(model)}
    summary |= {f"before_{name}": value for name, value in before(run).items()}
    run.finish(summary)
    return summary


# ---- the pieces


def find_loss(config: cfg.GrpoConfig) -> losses.Loss:
    """The policy loss of the config, with the KL section's and the rollout's values as its options."""
    options = dict(config.loss.options)
    if ":" not in config.loss.name and config.loss.name in losses.names("policy"):
        known = losses.defaults(config.loss.name)
        placement = config.kl.placement or losses.get(config.loss.name).kl_placement
        for name in ("kl_coef", "kl_estimator"):
            if name in options:
                raise UserError(f"loss.options.{name}: set kl.{name.removeprefix('kl_')} instead")
        if config.kl.coef and placement == "loss":
            options["kl_coef"] = config.kl.coef
            if config.kl.estimator:
                options["kl_estimator"] = config.kl.estimator
        if config.entropy.target is not None:
            options["entropy_coef"] = config.entropy.delta  # not 0: the loss then reads the entropy; each step sets it
        if options.get("reduce", known["reduce"]) == "token-sum/const":
            options.setdefault("max_completion_tokens", config.rollout.max_completion_tokens)
    elif config.entropy.target is not None:
        raise UserError(f"entropy.target: {config.loss.name} is your own loss and adds its own bonus; leave it null")
    elif config.kl.coef and config.kl.placement != "reward":
        raise UserError(
            f"kl.coef: {config.loss.name} is your own loss and adds its own KL; set kl.coef=0, or kl.placement=reward"
        )
    loss = losses.get(config.loss.name, kind="policy", preset=config.loss.preset, **options)
    losses.check(loss)
    advantages.estimator(config, loss)
    return loss


class Bonus:
    """The entropy bonus's coefficient from step to step (``losses.policy.adapt_entropy_coef``); None: not adaptive.

    A step's own entropy is known once it has run, so the one before it decides.
    """

    def __init__(self, settings: cfg.Entropy):
        self._settings, self._carried = settings, settings.coef
        self.now = None if settings.target is None else settings.coef

    def after(self, entropy: float | None) -> dict[str, float]:
        """Takes this step's entropy; returns the coefficient that the step used, as a metric."""
        if self.now is None:
            return {}
        used = self.now
        target = self._settings.target
        _, self._carried = adapt_entropy_coef(self._carried, entropy, target, self._settings.delta)
        self.now = self._carried if entropy <= target else 0.0
        return {"entropy_coef": used}

    def state(self) -> dict[str, float]:
        return {} if self.now is None else {"entropy_now": self.now, "entropy_carried": self._carried}

    def restore(self, state: dict) -> None:
        if self.now is not None:
            self.now, self._carried = state["entropy_now"], state["entropy_carried"]


def write_samples(file, step: int, sequences: list[Sequence]) -> None:
    for s in sequences:
        line = {
            "step": step, "group": s.group, "prompt": s.prompt.user, "gold": s.prompt.gold, "completion": s.text,
            "tokens": len(s.completion.tokens), "truncated": s.completion.truncated, "advantage": float(np.mean(s.advantage)),
            "reward": None if math.isnan(s.reward) else s.reward,
            "rewards": {k: None if math.isnan(v) else v for k, v in s.rewards.items()},
        }  # fmt: skip
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


class Watch:
    """Says so when steps teach nothing for a while: completions too short, or groups that all earn the same."""

    def __init__(self):
        self._streaks = {"truncated_fraction": 0, "zero_std_fraction": 0}

    def __call__(self, step: int, record: dict, config: cfg.GrpoConfig) -> None:
        fixes = {
            "truncated_fraction": f"raise rollout.max_completion_tokens ({config.rollout.max_completion_tokens})",
            "zero_std_fraction": "use easier or harder problems, a larger rollout.group_size, or rollout.resample_rounds",
        }
        for name, limit in (("truncated_fraction", 0.5), ("zero_std_fraction", 0.9)):
            self._streaks[name] = self._streaks[name] + 1 if record[name] > limit else 0
            if self._streaks[name] == _PATIENCE:
                console.print(f"warning: {name} was above {limit} for {_PATIENCE} steps up to {step}: {fixes[name]}")


def before(run: RunDir) -> dict[str, float]:
    """The evaluation of step 0, so that the summary shows both ends."""
    with open(run.path / "metrics.jsonl") as file:
        first = json.loads(file.readline())
    return {k: v for k, v in first.items() if k.startswith("eval_accuracy")} if first["step"] == 0 else {}
