"""GRPO: prompts, completions, rewards, advantages, updates; one flat loop from config to summary.json."""

import dataclasses
import json
import math
import time

import jax
import numpy as np

from jaxreason import config as cfg
from jaxreason import losses, rewards
from jaxreason.checkpoint import Checkpoints
from jaxreason.data import chat as chats
from jaxreason.data.prompts import Prompt, Prompts, load_prompts
from jaxreason.errors import UserError
from jaxreason.losses import PolicyInputs, advantage
from jaxreason.model import LlamaConfig, param_count, unstack
from jaxreason.rewards.pool import RewardPool
from jaxreason.rollout import Engine, Sampling
from jaxreason.sharding import check_batch, make_mesh, replicated, within
from jaxreason.train import optimizer as opt
from jaxreason.train import rollouts
from jaxreason.train import state as states
from jaxreason.train.evaluation import evaluate, sample_of
from jaxreason.train.rollouts import Sequence
from jaxreason.train.run import Interrupt, Log, RunDir, check_finite, console, gib, show_table
from jaxreason.train.setup import Setup, held_out_problems, open_model, put
from jaxreason.train.step import make_score, make_train_step
from jaxreason.types import Batch, combine_metrics

SHOWN = ("reward", "eval_accuracy", "completion_tokens", "entropy", "sampler_gap_max", "tokens_per_second")
_ROUNDS = 64  # keys of one step's resampling rounds; more rounds than anyone allows
_PATIENCE = 5  # steps in a row before a warning


def train(config: cfg.GrpoConfig, dry_run: bool = False) -> dict | None:
    """Runs the config, or resumes it, and returns its summary. Raises UserError for everything a user can mend."""
    # ---- inputs: nothing here starts a device
    setup = open_model(config.model)
    loss = find_loss(config)
    estimator = find_estimator(config, loss)
    graders = [(rewards.get(term.name, **term.options), term.weight) for term in config.reward.functions]
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
    model = setup.config

    # ---- shapes: rows of a fixed length, into which sequences are packed
    limit = config.rollout.max_completion_tokens
    longest = max(len(p.ids) for p in prompts.prompts)
    row_length = -(-(longest + limit) // 64) * 64
    rows = per_step * group // parts
    micro = config.train.microbatch_size or min(rows, 32)
    mesh = make_mesh(config.mesh)
    check_batch(rows, micro, mesh)
    count = rows // micro
    schedule = opt.schedule(config.optimizer, total * updates)
    optimizer = opt.make(config.optimizer, total * updates)
    abstract = states.abstract(model, optimizer, mesh)
    temperature = config.rollout.temperature
    engine = Engine(model, setup.tokenizer.stop_ids, _sampling(config.rollout), slots=config.rollout.slots)
    step_fn = make_train_step(model, loss, optimizer, schedule, count, temperature)
    out = (jax.tree.map(lambda s: s.sharding, abstract), None)
    train_step = within(mesh, jax.jit(step_fn, donate_argnums=0, out_shardings=out))
    score = within(mesh, jax.jit(make_score(model, count, temperature)))
    to_rollout = jax.jit(lambda params: unstack(params, model), out_shardings=replicated(mesh))
    show_table("grpo", [
        ("parameters", f"{param_count(model):,} ({model.num_layers} layers x {model.embed_dim})"),
        ("weights from", config.model.weights or f"random, seed {seed}"),
        ("problems", f"{len(prompts)} of {prompts.rows} rows" + "".join(f", {n} {r}" for r, n in prompts.dropped.items())),
        ("held out", f"{len(problems)} problems" if problems else "none"),
        ("rollout", f"{per_step} prompts x {group}, at most {limit} tokens, {config.rollout.slots} slots"),
        ("KV cache", gib(engine.kv_bytes(longest))),
        ("update", f"{updates} of {rows} sequences packed in rows of {row_length} tokens, microbatches of {micro} rows"),
        ("loss", f"{config.loss.name}, advantage {config.advantage.name or loss.advantage}, kl {config.kl.coef:g}"),
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
    cursor = 0
    if resume is not None:
        console.print(f"resuming {run.path} from step {resume // updates}")
        state, data_state = checkpoints.restore(resume, abstract)
        cursor = data_state["cursor"]
    elif setup.source:
        state = states.adopt(setup.source.params(model, mesh), model, optimizer, mesh)
    else:
        state = states.create(model, optimizer, mesh, seed)
    reference = None
    if config.kl.coef:
        frozen = model.replace(param_dtype=model.compute_dtype)
        reference = setup.source.params(frozen, mesh) if setup.source else states.create(
            frozen, optimizer, mesh, seed).params  # fmt: skip
    evaluator = Evaluator(config, setup, problems, model) if problems else None

    # ---- the loop
    start = int(state.step) // updates
    log, interrupt, watch = Log(run, config, total, start, SHOWN), Interrupt(), Watch()
    samples = open(run.path / "samples.jsonl", "a") if jax.process_index() == 0 else None
    began, record = time.monotonic(), {}
    pool = RewardPool(graders, config.reward.workers, config.reward.timeout_s, config.reward.on_error)
    try:
        if evaluator and start == 0:
            log.write(0, evaluator(to_rollout(state.params)))
        for step in range(start + 1, total + 1):
            clock = time.monotonic()
            weights, at = to_rollout(state.params), int(state.step)
            sequences, times, cursor, discarded = collect(
                config, engine, weights, prompts, setup, pool, estimator, step, cursor, at
            )
            del weights  # the rollout's copy is freed before the update needs the memory
            record = rollouts.metrics_of(sequences, labels(pool.names)) | discarded
            update_clock = time.monotonic()
            merged: dict[str, float] = {}
            batches = [
                make_inputs(config, loss, part, score, state.params, reference, mesh, row_length, rows, count, setup, step)
                for part in np.array_split(order(seed, step, len(sequences), parts), parts)
                for part in [[sequences[i] for i in part]]
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
            drawn = sum(len(s.completion.tokens) for s in sequences)
            record |= merged | {f"seconds_{name}": value for name, value in times.items()}
            record |= {"seconds": seconds, "tokens_per_second": drawn / seconds}
            last = step == total or interrupt.requested
            if evaluator and (step == total or (config.train.eval_every and step % config.train.eval_every == 0)):
                record |= evaluator(to_rollout(state.params))
            if samples:
                write_samples(samples, step, sequences)
            log.write(step, record)
            watch(step, record, config)
            checkpoints.check()
            if last or (config.train.save_every and step % config.train.save_every == 0):
                checkpoints.save(state, {"cursor": cursor}, model)
            if last:
                break
        checkpoints.wait()
    finally:
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
        for name in ("kl_coef", "kl_estimator"):
            if name in options:
                raise UserError(f"loss.options.{name}: set kl.{name.removeprefix('kl_')} instead")
        if config.kl.coef:
            options |= {"kl_coef": config.kl.coef, "kl_estimator": config.kl.estimator}
        if options.get("reduce", known["reduce"]) == "token-sum/const":
            options.setdefault("max_completion_tokens", config.rollout.max_completion_tokens)
    elif config.kl.coef:
        raise UserError(f"kl.coef: {config.loss.name} is your own loss and adds its own KL; set kl.coef=0")
    loss = losses.get(config.loss.name, kind="policy", preset=config.loss.preset, **options)
    losses.check(loss)
    return loss


def find_estimator(config: cfg.GrpoConfig, loss: losses.Loss):
    """rewards [F, P, G], totals [P, G], lengths [P, G] -> advantages [P, G]."""
    name = config.advantage.name or loss.advantage or "grpo"
    function = advantage.get(name, preset=loss.advantage_preset, **config.advantage.options)
    takes = advantage.reads(name)
    weights = np.array([term.weight for term in config.reward.functions])

    def estimate(rewards_F_P_G, totals_P_G, lengths_P_G):
        if "weights" in takes:
            return np.asarray(function(rewards_F_P_G, weights))
        return np.asarray(function(totals_P_G, lengths_P_G) if "lengths" in takes else function(totals_P_G))

    return estimate


def _sampling(rollout: cfg.Rollout) -> Sampling:
    return Sampling(
        temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k, min_p=rollout.min_p,
        max_completion_tokens=rollout.max_completion_tokens,
    )  # fmt: skip


def prompt_at(prompts: Prompts, cursor: int, seed: int, shuffle: bool) -> Prompt:
    """Prompt number ``cursor`` of the endless stream of epochs, each in its own order."""
    epoch, place = divmod(cursor, len(prompts))
    if not shuffle:
        return prompts[place]
    return prompts[int(np.random.default_rng([seed, epoch]).permutation(len(prompts))[place])]


def collect(config, engine, weights, prompts, setup, pool, estimator, step, cursor, params_step):
    """One step's sequences with advantages, seconds by phase, the prompts used so far, and what was discarded."""
    wanted, group = config.rollout.prompts_per_step, config.rollout.group_size
    kept: list[list[Sequence]] = []
    spare: list[list[Sequence]] = []  # groups without a gradient: they fill the step if rounds run out
    times, failed = {"rollout": 0.0, "reward": 0.0}, 0
    for attempt in range(config.rollout.resample_rounds + 1):
        chosen = [
            prompt_at(prompts, cursor + i, config.run.seed, config.data.shuffle) for i in range(wanted - len(kept))
        ]
        cursor += len(chosen)
        clock = time.monotonic()
        completions = engine.generate(
            weights, [p.ids for p in chosen], group, config.run.seed, step * _ROUNDS + attempt, params_step=params_step
        )
        if any(c.params_step != params_step for c in completions):
            raise RuntimeError("the rollout used weights of another step")
        times["rollout"] += time.monotonic() - clock
        clock = time.monotonic()
        inputs = [
            sample_of(chosen[c.prompt_index], c, setup.tokenizer, config.rollout.max_completion_tokens)
            for c in completions
        ]
        graded = pool.grade(inputs)
        failed += len(graded.errors)
        for error in graded.errors[:3]:
            console.print(f"step {step}: {error}", markup=False)
        times["reward"] += time.monotonic() - clock
        sequences = [
            Sequence(
                chosen[c.prompt_index], c, sample.completion, len(kept) + len(spare) + c.prompt_index,
                dict(zip(labels(pool.names), map(float, row))), math.nan if total is None else float(total),
            )
            for c, sample, row, total in zip(completions, inputs, graded.rewards, graded.total)
        ]  # fmt: skip
        groups = [sequences[i : i + group] for i in range(0, len(sequences), group)]
        useful = [bool(x) for x in advantage.informative_groups(np.array([[s.reward for s in g] for g in groups]))]
        if config.rollout.resample_rounds == 0:
            kept = groups
            break
        kept += [g for g, ok in zip(groups, useful) if ok]
        spare += [g for g, ok in zip(groups, useful) if not ok]
        if len(kept) == wanted:
            break
    discarded = max(0, len(kept) + len(spare) - wanted)
    kept = (kept + spare)[:wanted]
    totals_P_G = np.array([[s.reward for s in g] for g in kept])
    rewards_F_P_G = np.array([[[s.rewards[name] for s in g] for g in kept] for name in labels(pool.names)])
    lengths_P_G = np.array([[len(s.completion.tokens) for s in g] for g in kept])
    advantages_P_G = estimator(rewards_F_P_G, totals_P_G, lengths_P_G)
    sequences = [
        dataclasses.replace(s, group=p, advantage=float(advantages_P_G[p, i]))
        for p, g in enumerate(kept)
        for i, s in enumerate(g)
    ]
    return sequences, times, cursor, {"resampled_groups": discarded, "reward_errors": failed}


def labels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of reward functions in metrics: of ``path/file.py:function`` the function, where that is unambiguous."""
    short = tuple(name.rsplit(":", 1)[-1] for name in names)
    return short if len(set(short)) == len(short) else names


def order(seed: int, step: int, count: int, parts: int) -> np.ndarray:
    """Sequences in the order in which minibatches take them: as drawn for one, else shuffled."""
    return np.arange(count) if parts == 1 else np.random.default_rng([seed, step, parts]).permutation(count)


def make_inputs(
    config, loss, sequences, score, params, reference, mesh, row_length, rows, count, setup: Setup, step: int
) -> Batch:
    """The batch of one minibatch on the devices, with the log-probs that the loss compares with."""
    mask_truncated = config.train.truncated == "mask"

    def build(sequences):
        return put(
            rollouts.make_batch(sequences, row_length, rows, count, setup.tokenizer.pad_id, mask_truncated), mesh
        )

    batch = build(sequences)
    # One update from a rollout has ratio 1 by definition, and the step itself takes its own log-probs as the old ones.
    stats = score(params, batch) if config.train.updates_per_rollout > 1 or loss.select else None
    ref_logp = score(reference, batch).logp if reference is not None else None
    if stats is not None:
        batch = dataclasses.replace(batch, old_logp=stats.logp)
    if ref_logp is not None:
        batch = dataclasses.replace(batch, ref_logp=ref_logp)
    if loss.select is not None:
        inputs = PolicyInputs(
            stats.logp, stats.logp, batch.advantages, batch.loss_mask, entropy=stats.entropy,
            sequence_ids=batch.sequence_ids, group_ids=batch.group_ids,
        )  # fmt: skip
        key = jax.random.fold_in(jax.random.key(config.run.seed), step)
        batch = dataclasses.replace(batch, selected=loss.select(inputs, key))
    return batch


def write_samples(file, step: int, sequences: list[Sequence]) -> None:
    for s in sequences:
        line = {
            "step": step, "group": s.group, "prompt": s.prompt.user, "gold": s.prompt.gold, "completion": s.text,
            "tokens": len(s.completion.tokens), "truncated": s.completion.truncated, "advantage": s.advantage,
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


class Evaluator:
    """Greedy accuracy on held-out problems, and avg@k where ``eval.samples`` asks for it."""

    def __init__(self, config: cfg.GrpoConfig, setup: Setup, problems: Prompts, model: LlamaConfig):
        self._problems, self._tokenizer, self._samples = problems, setup.tokenizer, config.eval.samples
        self._seed = config.run.seed

        def engine(temperature: float) -> Engine:
            sampling = Sampling(temperature=temperature, max_completion_tokens=config.eval.max_completion_tokens)
            return Engine(model, setup.tokenizer.stop_ids, sampling, slots=config.eval.slots)

        self._greedy = engine(0.0)
        self._sampled = engine(config.eval.temperature) if self._samples > 1 else None

    def __call__(self, weights: dict) -> dict[str, float]:
        metrics, _ = evaluate(self._greedy, weights, self._problems.prompts, self._tokenizer)
        found = {f"eval_{name}": value for name, value in metrics.items()}
        if self._sampled:
            metrics, _ = evaluate(
                self._sampled, weights, self._problems.prompts, self._tokenizer, self._samples, self._seed
            )
            found |= {f"eval_avg_at_{self._samples}{name.removeprefix('accuracy')}": metrics[name]
                      for name in ("accuracy", "accuracy_low", "accuracy_high")}  # fmt: skip
        return found


def before(run: RunDir) -> dict[str, float]:
    """The evaluation of step 0, so that the summary shows both ends."""
    with open(run.path / "metrics.jsonl") as file:
        first = json.loads(file.readline())
    return {k: v for k, v in first.items() if k.startswith("eval_accuracy")} if first["step"] == 0 else {}
