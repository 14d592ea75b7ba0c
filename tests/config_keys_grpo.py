"""What of a GRPO run changes with each key of its config; see test_config_keys.py.

Everything that is particular to GRPO's rooms is named here and nowhere else: ``open_inputs``, ``shapes_of``, ``Collector``'s
sampler, the reward pool and the scoring models.
"""

import dataclasses
import json
import sys
import types
from typing import ClassVar

import config_keys_sft as shared
import jax
import numpy as np
import yaml
from config_keys_sft import Places, digest, mixture_rows
from helpers import grpo_words

from jaxreason import checkpoint, cli, losses, xla
from jaxreason import config as cfg
from jaxreason.data import prompts as data_prompts
from jaxreason.data.prompts import Prompt, PromptStream, load_prompts
from jaxreason.evaluate import accuracy
from jaxreason.losses.check import tiny_inputs
from jaxreason.losses.reduce import whole_step
from jaxreason.rl import adaptive, grpo
from jaxreason.rl.advantages import advantages_of
from jaxreason.rl.objective import find_loss, objective_of
from jaxreason.rl.sequence import Sequence
from jaxreason.rl.shapes import shapes_of
from jaxreason.sampler import Completion
from jaxreason.sharding import make_mesh
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.scoring import ScoringModel
from jaxreason.train.setup import held_out_problems, open_model


class Scripted:
    """A sampler without a model: sample i has 2 + i tokens; the last of a group is cut at the limit, the others stop."""

    jobs: ClassVar[list[tuple]] = []

    def __init__(self, model, stop_ids, mesh):
        self.stop, self.step = stop_ids[0], None

    def load(self, params, step):
        self.step = step

    def release(self):
        pass

    def memory_bytes(self, longest_prompt, job):
        return 0

    def generate(self, prompts, job, progress=None):
        self.jobs.append((job, [tuple(p) for p in prompts]))
        found = []
        for p in range(len(prompts)):
            for i in range(job.samples):
                cut = job.samples > 1 and i == job.samples - 1
                length = job.sampling.max_completion_tokens if cut else min(2 + i, job.sampling.max_completion_tokens)
                tokens = np.array([*range(20 + p, 20 + p + length - 1), 30 if cut else self.stop], np.int32)
                logp = np.full(length, -1.0, np.float32)
                found.append(Completion(p, i, tokens, logp, logp, cut, self.step))
        return found


def scripted(model, stop_ids, mesh):
    """What ``rollout.sampler`` names in these tests."""
    return Scripted(model, stop_ids, mesh)


# --- observations -----------------------------------------------------------------------------------------------------


def config_of(places: Places, words: list[str]) -> cfg.GrpoConfig:
    return cfg.load("grpo", grpo_words(places.root, *words))


def opened(places: Places, words: list[str]) -> object:
    """Whether the sources of the prompts are opened as streams."""
    asked, real = [], data_prompts.open_source
    data_prompts.open_source = lambda *given: asked.append(given[-1]) or real(*given)
    try:
        prompts(places, words)
    finally:
        data_prompts.open_source = real
    return asked


def prompts(places: Places, words: list[str]) -> object:
    """Prompts of 30 steps, and the held-out problems where there are any."""
    config = config_of(places, words)
    setup = open_model(config)
    found = load_prompts(config.data, setup.tokenizer, config.run.seed, max_prompt_tokens=config.data.max_prompt_tokens)
    stream = PromptStream(found, config.run.seed, config.data.shuffle)
    chat = grpo.chats.resolve(setup.tokenizer, config.data.template, config.data.system_prompt)
    held_out = held_out_problems(config, setup, chat)
    drawn = [(p.ids, p.gold, p.row) for p in (stream.at(i) for i in range(60))]
    return digest(drawn, chat, held_out and held_out.fingerprint, len(found))


def model(places: Places, words: list[str]) -> object:
    setup = open_model(config_of(places, words))
    return setup.config, setup.tokenizer.fingerprint, setup.resolved


def shapes(places: Places, words: list[str]) -> object:
    """Rows, microbatches, row length and fields of the batch."""
    config = config_of(places, words)
    return shapes_of(config, losses.get("grpo"), 40, make_mesh(cfg.Mesh(), jax.devices()[:1]))


def loss(places: Places, words: list[str]) -> object:
    """Value and gradient of the loss on a tiny batch."""
    found = find_loss(config_of(places, words))
    inputs = whole_step(tiny_inputs("policy"))
    if found.select is not None:
        inputs = dataclasses.replace(inputs, selected=found.select(inputs))
    gradient = jax.grad(lambda logp: found(dataclasses.replace(inputs, logp=logp))[0])(inputs.logp)
    return digest(found(inputs)[0], gradient)


def estimate(places: Places, words: list[str]) -> object:
    """Advantages of two groups."""
    found = objective_of(config_of(places, words))
    return found.estimator.name, digest(*found.estimator(np.array([[0.0, 1.0, 1.0], [0.25, 0.5, 0.0]]))[:1])


def placement(places: Places, words: list[str]) -> object:
    return objective_of(config_of(places, words)).placement


def updates(places: Places, words: list[str]) -> object:
    return shared.optimizer_trace(config_of(places, ["optimizer.warmup_steps=0", "optimizer.schedule=cosine", *words]).optimizer)


def bonus(places: Places, words: list[str]) -> object:
    """The adaptive entropy coefficient over three steps."""
    found, seen = adaptive.Bonus(config_of(places, words).entropy), []
    for entropy in (0.1, 0.2, 3.0):
        seen.append(found.after(entropy))
    return seen


def leash(places: Places, words: list[str]) -> object:
    """The adaptive coefficient of the KL over three steps."""
    found, seen = adaptive.Leash(config_of(places, words).kl), []
    for kl in (0.1, 0.2, 0.0):
        seen.append(found.after(kl))
    return seen


def refreshed(places: Places, words: list[str]) -> object:
    """The reference after two steps."""
    others = {"ref_logp": ScoringModel(None, {"w": jax.numpy.zeros(2)}, False)}
    policy = types.SimpleNamespace(model_params={"w": jax.numpy.ones(2)})
    grpo.refresh(config_of(places, words), others, policy, 2)
    return digest(others["ref_logp"].params()["w"])


def frozen(places: Places, words: list[str]) -> object:
    """What the optimizer never sees."""
    config = config_of(places, words)
    state = states.abstract(
        open_model(config).config, opt.make(config.optimizer, 1), make_mesh(cfg.Mesh(), jax.devices()[:1]), config.train.freeze
    )
    return jax.tree.structure(state.frozen)


def beside(places: Places, words: list[str]) -> object:
    """The adapters that a run opens, and what its optimizer and its start have of them."""
    config = config_of(places, words)
    setup = open_model(config)
    return setup.config.adapter, config.lora.learning_rate_ratio, config.lora.weights


def table(places: Places, words: list[str]) -> object:
    """What a dry run says before it would start."""
    shown, real = [], grpo.show_table
    grpo.show_table = lambda title, rows: shown.extend(rows)
    try:
        grpo.train(config_of(places, words), dry_run=True)
    finally:
        grpo.show_table = real
    return shown


def hooks(places: Places, words: list[str]) -> object:
    return [name for name, _ in objective_of(config_of(places, words)).hooks]


def devices(places: Places, words: list[str]) -> object:
    return dict(make_mesh(config_of(places, words).mesh).shape)


def earned(places: Places, words: list[str]) -> object:
    """Advantages of both turns of two prompts, with a teacher's and a reference's log-probs."""
    config = config_of(places, words)
    prompt = Prompt((1, 2), "", "", "", 0)

    def sequence(group: int, reward: float) -> Sequence:
        logp = np.full(3, -1.0, np.float32)
        completion = Completion(group, 0, np.arange(3, dtype=np.int32), logp, logp, False, 0)
        return Sequence(prompt, completion, "", group, {"digits": reward}, reward, ref_logp=logp * 2, teacher_logp=logp * 3)

    first = [[sequence(g, 0.5 * i + g) for i in range(2)] for g in range(2)]
    second = [[sequence(2 + i, 0.1 * i + 0.3 * k) for k in range(2)] for i in range(4)] if config.second_turn.samples else []
    turns = advantages_of(first, second, objective_of(config), config)
    return digest(*(np.asarray(s.advantage) for turn in turns for group in turn for s in group))


def divergence(places: Places, words: list[str]) -> object:
    """What is measured between two distributions."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 11)).astype(np.float32)
    return digest(objective_of(config_of(places, words)).loss.divergence(*logits))


def told(places: Places, words: list[str]) -> object:
    """What the teacher reads of the first problem, and how much longer that may be."""
    config = config_of(places, words)
    inputs = grpo.open_inputs(config)
    done = Completion(0, 0, np.zeros(1, np.int32), np.zeros(1), np.zeros(1), False, 0)
    groups = inputs.teacher_prompts([[Sequence(inputs.prompts[0], done, "", 0, {}, 0.0)]])
    return groups[0][0].teacher_ids, inputs.teacher_prompts.max_more


NOT_EMBEDDED = ["data.source={rows}", "data.max_rows=null"]
SPLITS = ["data.source={splits}", "data.max_rows=null"]

TAUGHT = ["loss.name=distill", "teacher.weights=start", "teacher.divergence=reverse_kl"]
TOLD = [*TAUGHT, "teacher.context=answer", "rollout.max_completion_tokens=100"]

ROWS: dict[str, tuple] = {
    "run.seed": (prompts, 1),
    "model.preset": (model, "llama3.2-1b", "model.overrides={{vocab_size: 512}}"),
    "model.overrides": (model, "{{num_layers: 1, embed_dim: 32, mlp_dim: 64, num_heads: 2, num_kv_heads: 1, head_dim: 16}}"),
    "model.tokenizer": (model, "{tokenizer}", "model.overrides={{vocab_size: 512}}"),
    "model.param_dtype": (model, "bfloat16"),
    "model.compute_dtype": (model, "bfloat16"),
    "model.attention": (model, "reference"),
    "model.remat": (model, "full"),
    "model.scan_layers": (model, "false"),
    "data.source": (prompts, "{rows}"),
    "data.split": (prompts, "test", *SPLITS),
    "data.schema": (prompts, "problem_answer", "data.source={rows}"),
    "data.system_prompt": (prompts, "Think first."),
    "data.template": (prompts, "r1_zero", "data.max_prompt_tokens=512"),
    "data.trust_special_tokens": (prompts, "true", "data.source={marked}", "data.max_rows=null"),
    "data.max_rows": (prompts, 20),
    "data.streaming": (opened, "true"),
    **mixture_rows(prompts, NOT_EMBEDDED),
    "data.keep_columns": (prompts, "[level]", *NOT_EMBEDDED),
    "data.eval_source": (prompts, "{other}", "eval.problems=5"),
    "data.eval_split": (prompts, "validation", *SPLITS, "eval.problems=5", "data.eval_source={splits}"),
    "data.max_prompt_tokens": (prompts, 20),
    "data.shuffle": (prompts, "false"),
    "rollout.hooks": (hooks, "['{mine}:hook']"),
    "advantage.name": (estimate, "rloo"),
    "advantage.options": (estimate, "{{eps: 1.0}}"),
    "loss.name": (loss, "dapo"),
    "loss.options": (loss, "{{clip_low: 0.01}}"),
    "loss.preset": (loss, "verl", "loss.name=gspo"),
    "kl.coef": (loss, 0.5),
    "kl.placement": (placement, "reward", "kl.coef=0.1"),
    "kl.estimator": (loss, "k2", "kl.coef=0.5"),
    "kl.target": (leash, 0.1, "kl.coef=0.1"),
    "kl.gain": (leash, 0.2, "kl.coef=0.1", "kl.target=0.1"),
    "kl.refresh_every": (refreshed, 2, "kl.coef=0.1"),
    "kl.refresh_weight": (refreshed, 0.5, "kl.coef=0.1", "kl.refresh_every=2"),
    "teacher.coef": (earned, 3.0),
    "teacher.divergence": (divergence, "jsd", *TAUGHT),
    "teacher.options": (divergence, "{{top_k: 2}}", *TAUGHT),
    "teacher.context": (told, "solution", *TOLD),
    "teacher.prompt": (told, "'{{question}} ({{context}})'", *TOLD),
    "teacher.max_context_tokens": (told, 3, *TOLD),
    "teacher.data_fraction": (shapes, 0.5, *TAUGHT),
    "rollout.expert": (shapes, "true"),
    "second_turn.compare": (earned, "first", "second_turn.samples=2"),
    "entropy.target": (bonus, 1.0),
    "entropy.coef": (bonus, 0.1, "entropy.target=1.0"),
    "entropy.delta": (bonus, 0.1, "entropy.target=1.0"),
    "train.microbatch_size": (shapes, 2),
    "train.epochs": (table, 2, "train.steps=null", "train.epochs=1"),
    "train.freeze": (frozen, "[embedding]"),
    **{key: (beside, *row[1:]) for key, row in shared.ROWS.items() if key.startswith("lora.")},
    **{key: (updates, *row[1:]) for key, row in shared.ROWS.items() if key.startswith("optimizer.")},
    **{key: (devices, *row[1:]) for key, row in shared.ROWS.items() if key.startswith("mesh.")},
}  # fmt: skip


# --- one real run, and what each key leaves in it --------------------------------------------------------------------


def real_run(places: Places) -> dict:
    """Two steps of two updates with a scripted sampler, everything switched on, from the SFT run before."""
    log: dict = {"offloaded": []}
    mine = places.root / "mine.py"
    words = [
        *grpo_words(places.root / "elsewhere"), "run.name=grpo-named", "run.deterministic=true", "run.seed=7",
        f"model.weights={places.run}", "model.preset=null", "model.overrides={}", "rollout.sampler=config_keys_grpo:scripted",
        "rollout.temperature=0.7", "rollout.top_p=0.9", "rollout.top_k=5", "rollout.min_p=0.01",
        "rollout.max_completion_tokens=9", "rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.slots=6",
        "rollout.offload_state=true",
        "rollout.resample_rounds=1", f"reward.functions=[{{name: '{mine}:graded', weight: 0.25, options: {{scale: 4.0}}}}]",
        "reward.workers=0", "reward.timeout_s=33", "reward.on_error=stop", "kl.coef=0.1", "kl.offload=true",
        f"teacher.weights={places.run}", "teacher.coef=2.5", "teacher.offload=true", "second_turn.samples=3",
        "second_turn.phrases=['Look again, please.']", "second_turn.compare=first", "second_turn.train=none",
        "train.steps=2", "train.updates_per_rollout=2", "train.minibatches=2", "train.truncated=mask",
        "train.save_every=1", "train.keep_checkpoints=1", "train.eval_every=1", "train.profile_steps=[1, 1]",
        "train.tensorboard=true", "train.wandb=project", "train.trackio=board",
        "train.mlflow=experiment", "train.max_skipped_updates=7", "eval.problems=3", f"eval.grader={mine}:right",
        "eval.max_completion_tokens=5", "eval.slots=4", "eval.samples=2", "eval.temperature=0.3",
        "eval.workers=1", "eval.timeout_s=44",
    ]  # fmt: skip
    Scripted.jobs.clear()
    with spied(log):
        assert cli.train(["--config", "grpo", *words]) == 0
    folder = places.root / "elsewhere" / "grpo-named"
    read = lambda name: [json.loads(line) for line in (folder / name).read_text().splitlines()]  # noqa: E731
    tokenizer = shared.load("embedded")
    jobs = [(job, [tokenizer.decode(list(p)) for p in found]) for job, found in list(Scripted.jobs)]
    return {
        "folder": folder, "log": log, "lines": [x for x in read("metrics.jsonl") if x["step"]], "samples": read("samples.jsonl"),
        "rollouts": [x for x in jobs if x[0].sampling.top_k == 5 and x[0].samples == 4],
        "second": [x for x in jobs if x[0].sampling.top_k == 5 and x[0].samples == 3],
        "greedy": [x for x in jobs if x[0].sampling.temperature == 0.0],
        "sampled": [x for x in jobs if x[0].sampling.temperature == 0.3],
        "resolved": yaml.safe_load((folder / "config.yaml").read_text())["resolved"],
    }  # fmt: skip


class spied:
    """Puts the doors of one run under observation: the pool's arguments, scoring models, XLA's settings, metric sinks."""

    def __init__(self, log: dict):
        self.log = log

    def __enter__(self) -> None:
        self.saved = grpo.RewardPool, grpo.ScoringModel, xla.configure, dict(sys.modules)
        pool, model, log = grpo.RewardPool, grpo.ScoringModel, self.log

        def pool_of(graders, workers, timeout_s, on_error):
            log.update(workers=workers, timeout_s=timeout_s, on_error=on_error)
            return pool(graders, workers, timeout_s, on_error)

        def eval_pool_of(graders, workers, timeout_s, on_error):
            log.update(eval_workers=workers, eval_timeout_s=timeout_s)
            return pool(graders, workers, timeout_s, on_error)

        def model_of(score, params, offload):
            log["offloaded"].append(offload)
            return model(score, params, offload)

        grpo.RewardPool, grpo.ScoringModel, accuracy.RewardPool = pool_of, model_of, eval_pool_of
        xla.configure = lambda platform, devices=1, deterministic=False: log.update(deterministic=deterministic) or {}
        sys.modules.update(shared.Writer(log).modules)

    def __exit__(self, *error: object) -> None:
        grpo.RewardPool, grpo.ScoringModel, xla.configure, modules = self.saved
        accuracy.RewardPool = grpo.RewardPool
        for name in shared.Writer({}).modules:
            sys.modules.pop(name)
            if name in modules:
                sys.modules[name] = modules[name]


def sampling(run: dict) -> object:
    return run["rollouts"][0][0].sampling


RUN = {
    "algorithm": lambda r: len(r["samples"]) > 0,
    "run.name": lambda r: (r["folder"] / "summary.json").is_file(),
    "run.dir": lambda r: (r["folder"] / "config.yaml").is_file(),
    "run.deterministic": lambda r: r["log"]["deterministic"] is True,
    "model.weights": lambda r: r["resolved"]["weights"].endswith("00000004"),
    "rollout.temperature": lambda r: sampling(r).temperature == 0.7,
    "rollout.top_p": lambda r: sampling(r).top_p == 0.9,
    "rollout.top_k": lambda r: sampling(r).top_k == 5,
    "rollout.min_p": lambda r: sampling(r).min_p == 0.01,
    "rollout.max_completion_tokens": lambda r: whole_text(r),
    "rollout.prompts_per_step": lambda r: len(r["rollouts"][0][1]) == 2,
    "rollout.group_size": lambda r: r["rollouts"][0][0].samples == 4,
    "rollout.slots": lambda r: r["rollouts"][0][0].slots == 6,
    "rollout.offload_state": lambda r: r["lines"][0]["seconds_offload"] > 0,
    "rollout.sampler": lambda r: [job.draw for job, _ in r["rollouts"]] == [64, 128],  # each step's first of 64 keys
    "rollout.resample_rounds": lambda r: "drawn_reward" in r["lines"][0],
    "reward.functions.name": lambda r: set(r["samples"][0]["rewards"]) == {"graded"},
    "reward.functions.weight": lambda r: r["samples"][0]["reward"] == 0.25 * r["samples"][0]["rewards"]["graded"],
    "reward.functions.options": lambda r: r["samples"][0]["rewards"]["graded"] == 4.0 * 0.5 * r["samples"][0]["tokens"],
    "reward.workers": lambda r: r["log"]["workers"] == 0,
    "reward.timeout_s": lambda r: r["log"]["timeout_s"] == 33,
    "reward.on_error": lambda r: r["log"]["on_error"] == "stop",
    "kl.offload": lambda r: r["log"]["offloaded"][0] is True,
    "teacher.weights": lambda r: r["resolved"]["teacher"] == r["resolved"]["weights"],
    "teacher.offload": lambda r: r["log"]["offloaded"][1] is True,
    "second_turn.samples": lambda r: len(r["second"][0][1]) == 8 and r["second"][0][0].samples == 3,
    "second_turn.phrases": lambda r: "Look again, please." in r["second"][0][1][0],
    "second_turn.train": lambda r: r["lines"][0]["tokens"] * 2 == trained(r),
    "train.steps": lambda r: len(r["lines"]) == 2,
    "train.updates_per_rollout": lambda r: checkpoint.steps(r["folder"] / "checkpoints") == [4],
    "train.minibatches": lambda r: r["lines"][0]["tokens"] * 2 == trained(r),  # each update trains half of the rollout
    "train.truncated": lambda r: r["lines"][0]["tokens"] * 2 == trained(r),  # of four samples the three that stopped
    "train.save_every": lambda r: (r["folder"] / "checkpoints").is_dir(),
    "train.keep_checkpoints": lambda r: len(checkpoint.steps(r["folder"] / "checkpoints")) == 1,
    "train.eval_every": lambda r: all("eval_accuracy" in line for line in r["lines"]),
    "train.profile_steps": lambda r: any((r["folder"] / "profile").rglob("*.pb")),
    "train.tensorboard": lambda r: r["log"]["scalars"] > 0,
    "train.wandb": lambda r: r["log"]["project"] == "project",
    "train.trackio": lambda r: r["log"]["trackio"] == "board",
    "train.mlflow": lambda r: r["log"]["mlflow"] == "experiment",
    "train.max_skipped_updates": lambda r: r["lines"][-1]["skipped_updates"] == 0,
    "eval.problems": lambda r: len(r["greedy"][0][1]) == 3,
    "eval.grader": lambda r: r["lines"][0]["eval_accuracy"] == 1.0,
    "eval.max_completion_tokens": lambda r: r["greedy"][0][0].sampling.max_completion_tokens == 5,
    "eval.slots": lambda r: r["greedy"][0][0].slots == 4,
    "eval.workers": lambda r: r["log"]["eval_workers"] == 1,
    "eval.timeout_s": lambda r: r["log"]["eval_timeout_s"] == 44,
    "eval.samples": lambda r: r["sampled"][0][0].samples == 2,
    "eval.temperature": lambda r: r["sampled"][0][0].sampling.temperature == 0.3,
    **{f"resolved.{key}": lambda r, key=key: r["resolved"][key] is not None for key in cfg.Resolved.model_fields},
}


def whole_text(run: dict) -> bool:
    """What was cut has nine tokens, and the grader saw all of them: the last one is not a stop token."""
    cut = next(s for s in run["samples"] if s["truncated"])
    return cut["tokens"] == 9 and cut["completion"] == shared.load("embedded").decode([*range(20, 28), 30])


def trained(run: dict) -> float:
    """Tokens of the first step's first turn that were not cut: the samples of 2, 3 and 4 tokens of two prompts."""
    first = [s for s in run["samples"] if s["step"] == 1 and s["group"] < 2]
    return float(sum(s["tokens"] for s in first if not s["truncated"]))
