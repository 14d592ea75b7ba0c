"""What of an SFT run changes with each key of its config; see test_config_keys.py."""

import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import data_helpers
import jax
import jax.numpy as jnp
import numpy as np
import yaml
from helpers import TINY, sft_words

from jaxreason import checkpoint, cli, hf
from jaxreason import config as cfg
from jaxreason.data import sources
from jaxreason.data.pipeline import prepare
from jaxreason.data.tokenizer import load
from jaxreason.evaluate import accuracy
from jaxreason.model import Adapter, init, init_adapters, preset
from jaxreason.sharding import make_mesh
from jaxreason.train import optimizer as opt
from jaxreason.train import sft
from jaxreason.train.setup import held_out_problems, open_model, start_state
from jaxreason.weights import WeightSource


class Places:
    """Files that the rows name: data sets, a tokenizer; and the runs that the joint checks look at."""

    def __init__(self, root: Path):
        self.root, self.run = root, ""
        self.rows = data_helpers.write_jsonl(root / "rows.jsonl", [self._row(i) for i in range(40)])
        self.other = data_helpers.write_jsonl(root / "other.jsonl", [self._row(i) for i in range(100, 140)])
        self.marked = data_helpers.write_jsonl(root / "marked.jsonl", [self._row(i, " <|eot_id|>") for i in range(40)])
        self.splits = root / "splits"
        for split, first in (("train", 0), ("test", 50), ("validation", 70)):
            (self.splits / split).mkdir(parents=True)
            data_helpers.write_jsonl(self.splits / split / "a.jsonl", [self._row(first + i) for i in range(20)])
        self.tokenizer = root / "tokenizer"
        data_helpers.llama().save(self.tokenizer, "{{ messages[0]['content'] }}")
        (root / "mine.py").write_text(MINE)

    @functools.cached_property
    def start(self) -> Path:
        """A checkpoint to stand beside."""
        config = preset("embedded-tiny", {"num_layers": 1, "embed_dim": 32, "mlp_dim": 48, "num_heads": 2, "num_kv_heads": 1})
        checkpoint.save_params(self.root / "start" / "checkpoints", init(config, jax.random.key(0)), config)
        load("embedded").save(self.root / "start" / "tokenizer")
        return self.root / "start"

    @functools.cached_property
    def peft(self) -> Path:
        """An adapter of it."""
        config = WeightSource.at(str(self.start / "checkpoints" / "00000000")).config("float32", "float32")
        config = dataclasses.replace(config, adapter=Adapter(4, 8.0, ("q", "k", "v", "o", "gate", "up", "down")))
        hf.save_adapters(init_adapters(config, jax.random.key(5)), config, str(self.root / "peft"), "base")
        return self.root / "peft"

    @staticmethod
    def _row(i: int, asked: str = "") -> dict:
        reply = f"<think>\n{'1 + 1 = 2 ' * (1 + i % 9)}\n</think>\n\n{i}"
        turns = [{"role": "user", "content": f"{i} + 0 ={asked}"}, {"role": "assistant", "content": reply}]
        other = {"problem": f"{i} ?", "answer": str(i), "solution": f"<think>\nabc\n</think>\n\n{i}"}
        return {"messages": turns, "gold": i, "correct": i % 3 > 0, "level": i, **other}


MINE = '''
def graded(sample, scale=1.0):
    """Half of the scale for every token."""
    return scale * 0.5 * sample.completion_tokens

def hook(groups):
    return {}

def right(sample):
    return float(sample.completion_tokens == 2)
'''


# --- observations -----------------------------------------------------------------------------------------------------


def digest(*values: object) -> str:
    """Of arrays by their bytes, of everything else by its text."""
    state = hashlib.sha256()
    for value in values:
        state.update(np.ascontiguousarray(value) if isinstance(value, (np.ndarray, jax.Array)) else repr(value).encode())
    return state.hexdigest()[:12]


def config_of(places: Places, words: list[str]) -> cfg.SftConfig:
    return cfg.load("sft", sft_words(places.root, "data.max_rows=60", *words))


def data(places: Places, words: list[str]) -> object:
    """The first batches of two epochs and the held-out ones."""
    config = config_of(places, words)
    found = prepare(config.data, load("embedded"), config.run.seed, progress=False)
    if config.data.streaming:
        with found.batches(3, 0, 1) as streamed:
            batches = list(streamed)
    else:
        batches = [found.train.batch(i) for i in (0, 1, found.train.num_steps())]
    batches += [found.eval.batch(0)] if found.eval else []
    return digest(*jax.tree.leaves(batches)), found.chat, [b.tokens.shape for b in batches]


def mixture_rows(observe: Callable, context: list[str]) -> dict[str, tuple]:
    """The rows of ``data.mixture``, whose one source is the other file where a row does not say more."""

    def see(places: Places, words: list[str]) -> object:
        part = {"source": str(places.other)}
        part |= dict(word.removeprefix("data.mixture.").split("=", 1) for word in words if word.startswith("data.mixture."))
        rest = [word for word in words if not word.startswith("data.mixture.")]
        return observe(places, [*rest, f"data.mixture=[{{{', '.join(f'{key}: {value}' for key, value in part.items())}}}]"])

    changes = {"source": "{marked}", "schema": "problem_answer", "max_rows": 20, "weight": 0.5}
    found = {f"data.mixture.{key}": (see, value, *context) for key, value in changes.items()}
    return found | {"data.mixture.split": (see, "test", "data.mixture.source={splits}", *context)}


def problems(places: Places, words: list[str]) -> object:
    """The held-out problems."""
    config = config_of(places, ["eval.problems=10", *words])
    setup = open_model(config)
    found = held_out_problems(config, setup, prepare(config.data, setup.tokenizer, 0, progress=False).chat)
    return found.fingerprint, [p.row for p in found.prompts]


def model(places: Places, words: list[str]) -> object:
    """Architecture, execution, tokenizer and weights."""
    setup = open_model(config_of(places, words))
    return setup.config, setup.tokenizer.fingerprint, setup.resolved


def program(places: Places, words: list[str]) -> object:
    """The step that a dry run hands to the compiler, its shardings included, and what it prints of the data."""
    texts = []

    def compile_nothing(self, *args, **options):
        texts.append(self.as_text())
        return types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(temp_size_in_bytes=0))

    real, jax.stages.Lowered.compile = jax.stages.Lowered.compile, compile_nothing
    try:
        sft.train(config_of(places, words), dry_run=True)
    finally:
        jax.stages.Lowered.compile = real
    return digest(*texts)


def updates(places: Places, words: list[str]) -> object:
    """Three updates of a matrix and a norm, in a run of ten."""
    config = cfg.load("sft", [*TINY, "optimizer.warmup_steps=0", *words])
    return optimizer_trace(config.optimizer)


def optimizer_trace(settings: cfg.Optimizer) -> object:
    """Parameters and moments of three updates with unequal gradients."""
    tx, params = opt.make(settings, 10), {"kernel": jnp.full((4, 4), 0.5), "scale": jnp.ones(4)}
    state, found = tx.init(params), []
    for k in range(3):
        grads = jax.tree.map(lambda x, k=k: jnp.cos(jnp.arange(x.size) + 1.0 + k).reshape(x.shape) * 1e-3**k, params)
        step, state = tx.update(grads, state, params)
        params = opt.apply(params, step, k)
        found += jax.tree.leaves((params, state))
    return digest(*found), [x.dtype.name for x in jax.tree.leaves(state)]


def adapters(places: Places, words: list[str]) -> object:
    """What trains at the start of a run from a checkpoint, and its first update."""
    config = config_of(places, words)
    setup, optimizer = open_model(config), opt.of_run(config, 10)
    state = start_state(config, setup, optimizer, make_mesh(cfg.Mesh(), jax.devices()[:1]))
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, state.params), state.opt_state, state.params)
    return setup.config.adapter, digest(*jax.tree.leaves((state.params, updates)))


def mesh(places: Places, words: list[str]) -> object:
    """How the devices are laid out."""
    return dict(make_mesh(config_of(places, words).mesh).shape)


def processes(places: Places, words: list[str]) -> object:
    """How many processes tokenize."""
    from jaxreason.data import tokenizing

    asked = []

    class Pool:
        def __init__(self, count, *args, **options):
            asked.append(count)
            raise KeyboardInterrupt

    real = tokenizing._PATIENCE_SECONDS, tokenizing.concurrent.futures.ProcessPoolExecutor, sources.CHUNK_ROWS
    tokenizing._PATIENCE_SECONDS, tokenizing.concurrent.futures.ProcessPoolExecutor, sources.CHUNK_ROWS = -1, Pool, 5
    try:
        data(places, [f"data.cache_dir={places.root / digest(words)}", *words])
    except KeyboardInterrupt:
        pass
    finally:
        tokenizing._PATIENCE_SECONDS, tokenizing.concurrent.futures.ProcessPoolExecutor, sources.CHUNK_ROWS = real
    return asked


# --- key: (observation, the changed value, words that both have) -----------------------------------------------------

NOT_EMBEDDED = ["data.source={rows}", "data.max_rows=null", "data.max_length=256"]
SPLITS = ["data.source={splits}", "data.max_rows=null", "data.max_length=256"]

START = ["model.weights={start}", "model.preset=null", "model.overrides={{}}"]
BESIDE = [*START, "lora.rank=4"]

ROWS: dict[str, tuple] = {
    "run.seed": (data, 1),
    "model.preset": (model, "llama3.2-1b", "model.overrides={{vocab_size: 512}}"),
    "model.overrides": (program, "{{num_layers: 1, embed_dim: 32, mlp_dim: 64, num_heads: 2, num_kv_heads: 1, head_dim: 16}}"),
    "model.tokenizer": (model, "{tokenizer}", "model.overrides={{vocab_size: 512}}"),
    "model.param_dtype": (program, "bfloat16"),
    "model.compute_dtype": (program, "bfloat16"),
    "model.attention": (program, "reference"),
    "model.remat": (program, "full"),
    "model.scan_layers": (program, "false"),
    "data.source": (data, "{rows}", "data.max_length=256"),
    "data.split": (data, "test", *SPLITS),
    "data.schema": (data, "problem_answer", *NOT_EMBEDDED),
    "data.system_prompt": (data, "Think first.", "data.max_length=256"),
    "data.template": (data, "r1_zero", "data.max_length=512"),
    "data.trust_special_tokens": (data, "true", "data.source={marked}", "data.max_rows=null", "data.max_length=256"),
    "data.max_rows": (data, 50),
    **mixture_rows(data, NOT_EMBEDDED),
    "data.keep_columns": (problems, "[level]", *NOT_EMBEDDED, "data.eval_source={other}"),
    "data.eval_source": (data, "{other}", "data.max_length=256"),
    "data.eval_split": (data, "validation", *SPLITS, "data.eval_source={splits}"),
    "data.keep_only_correct": (data, "true", *NOT_EMBEDDED),
    "data.max_length": (program, 160),
    "data.over_length": (data, "truncate", "data.max_length=64"),
    "data.packing": (data, "false"),
    "data.shuffle": (data, "false"),
    "data.batch_size": (program, 16),
    "data.think_weight": (data, 0.5),
    "data.answer_weight": (data, 0.5),
    "data.eval_rows": (data, 8),
    "data.streaming": (data, "true", *NOT_EMBEDDED, "data.batch_size=2"),
    "data.stream_rows": (data, 5, *NOT_EMBEDDED, "data.streaming=true", "data.batch_size=2"),
    "data.workers": (processes, 3),
    "loss.name": (program, "dft"),
    "loss.options": (program, "{{z_loss_coef: 0.1}}"),
    "optimizer.learning_rate": (updates, 0.5),
    "optimizer.schedule": (updates, "linear"),
    "optimizer.warmup_steps": (updates, 2),
    "optimizer.warmup_fraction": (updates, 0.5),
    "optimizer.final_fraction": (updates, 0.5),
    "optimizer.weight_decay": (updates, 0.9),
    "optimizer.b1": (updates, 0.5),
    "optimizer.b2": (updates, 0.5),
    "optimizer.eps": (updates, 0.1),
    "optimizer.max_grad_norm": (updates, 1e-4),
    "optimizer.moment_dtype": (updates, "bfloat16"),
    "train.steps": (program, 9),
    "train.microbatch_size": (program, 8, "data.batch_size=16"),
    "train.freeze": (program, "[embedding]"),
    "lora.rank": (adapters, 4, *START),
    **{f"lora.{key}": (adapters, value, *BESIDE) for key, value in (
        ("base", "nf4"), ("alpha", 8.0),
        ("scaling", "sqrt_rank"), ("targets", "[q]"), ("kind", "dora"), ("init", "pissa"), ("learning_rate_ratio", 16.0),
        ("weights", "{peft}"))},
    "train.neftune_alpha": (program, 5.0),
    "mesh.data": (mesh, 2),
    "mesh.fsdp": (mesh, 4, "mesh.data=-1", "mesh.fsdp=8"),
    "mesh.tensor": (mesh, 2),
}

# --- one real run, and what each key leaves in it --------------------------------------------------------------------


class Writer:
    """Stands in for tensorboardX, wandb, trackio and mlflow."""

    def __init__(self, log: dict):
        self.log = log
        self.modules = {
            "tensorboardX": types.SimpleNamespace(SummaryWriter=lambda *args, **options: self),
            "wandb": types.SimpleNamespace(
                init=lambda **options: log.update(project=options["project"]), log=lambda *args, **options: None,
                finish=self.close,
            ),
            "trackio": types.SimpleNamespace(
                init=lambda **options: log.update(trackio=options["project"]), log=lambda *args, **options: None,
                finish=self.close,
            ),
            "mlflow": types.SimpleNamespace(
                set_experiment=lambda name: log.update(mlflow=name), log_dict=lambda *args: None, end_run=self.close,
                start_run=lambda **options: types.SimpleNamespace(info=types.SimpleNamespace(run_id="7")),
                log_metrics=lambda *args, **options: None,
            ),
        }  # fmt: skip

    def close(self) -> None:
        self.log["closed"] = self.log.get("closed", 0) + 1

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log["scalars"] = self.log.get("scalars", 0) + 1


def real_run(places: Places) -> dict:
    """Four steps with everything switched on: folder, spied calls, metrics."""
    from config_keys_grpo import Scripted

    from jaxreason import xla

    log: dict = {}
    words = [
        *sft_words(places.root / "elsewhere"), "run.name=named", "run.deterministic=true", "train.steps=null", "train.epochs=0.1",
        "train.save_every=1", "train.keep_checkpoints=3", "train.eval_every=2", "train.profile_steps=[2, 3]",
        "train.tensorboard=true", "train.wandb=project", "train.trackio=board",
        "train.mlflow=experiment", "train.max_skipped_updates=7",
        "eval.problems=3", f"eval.grader={places.root / 'mine.py'}:right",
        "eval.max_completion_tokens=5", "eval.slots=2", "eval.workers=1", "eval.timeout_s=33",
        "loss.name=psft", "reference.refresh_every=2", "data.packing=false", f"data.cache_dir={places.root / 'tokens'}",
    ]  # fmt: skip
    Scripted.jobs.clear()
    saved = sft.EngineSampler, xla.configure, {name: sys.modules.get(name) for name in Writer({}).modules}
    pool = accuracy.RewardPool

    def pool_of(graders, workers, timeout_s, on_error):
        log.update(eval_workers=workers, eval_timeout_s=timeout_s)
        return pool(graders, workers, timeout_s, on_error)

    sft.EngineSampler, accuracy.RewardPool = Scripted, pool_of
    xla.configure = lambda platform, devices=1, deterministic=False: log.update(deterministic=deterministic) or {}
    sys.modules.update(Writer(log).modules)
    try:
        assert cli.train(["--config", "sft", *words]) == 0
    finally:
        (sft.EngineSampler, xla.configure), accuracy.RewardPool = saved[:2], pool
        for name, module in saved[2].items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    folder = places.root / "elsewhere" / "named"
    lines = [yaml.safe_load(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    places.run = str(folder)
    return {
        "folder": folder, "log": log, "lines": lines, "jobs": list(Scripted.jobs), "places": places,
        "continued": continued(folder, places),
    }  # fmt: skip


def continued(folder: Path, places: Places) -> cfg.Resolved:
    """What a run finds that starts from that one and distils it."""
    words = ["model.preset=null", "model.overrides={}", f"model.weights={folder}", "loss.name=forward_kl"]
    config = config_of(places, [*words, f"teacher.weights={folder}"])
    return sft.compared_with(config, sft.find_loss(config), open_model(config))[1]


RUN = {
    "run.name": lambda r: (r["folder"] / "summary.json").is_file(),
    "run.dir": lambda r: (r["folder"].parent / "named" / "config.yaml").is_file(),
    "run.deterministic": lambda r: r["log"]["deterministic"] is True,
    "data.cache_dir": lambda r: any((r["places"].root / "tokens").rglob("tokens.bin")),
    "train.epochs": lambda r: len(r["lines"]) == 4,  # a tenth of 300 rows, 8 a step
    "train.save_every": lambda r: 3 in checkpoint.steps(r["folder"] / "checkpoints"),
    "reference.refresh_every": lambda r: (r["folder"] / "checkpoints" / "00000004" / "reference").is_dir(),
    "train.keep_checkpoints": lambda r: checkpoint.steps(r["folder"] / "checkpoints") == [2, 3, 4],
    "train.eval_every": lambda r: [line["step"] for line in r["lines"] if "eval_accuracy" in line] == [2, 4],
    "train.profile_steps": lambda r: any((r["folder"] / "profile").rglob("*.pb")),
    "train.tensorboard": lambda r: r["log"]["scalars"] > 0,
    "train.wandb": lambda r: r["log"]["project"] == "project",
    "train.trackio": lambda r: r["log"]["trackio"] == "board",
    "train.mlflow": lambda r: r["log"]["mlflow"] == "experiment",
    "train.max_skipped_updates": lambda r: r["lines"][-1]["skipped_updates"] == 0,
    "eval.problems": lambda r: r["lines"][-1]["eval_problems"] == 3,
    "eval.grader": lambda r: r["lines"][-1]["eval_accuracy"] == 1.0,  # the scripted answer has two tokens
    "eval.max_completion_tokens": lambda r: r["jobs"][-1][0].sampling.max_completion_tokens == 5,
    "eval.slots": lambda r: r["jobs"][-1][0].slots == 2,
    "eval.workers": lambda r: r["log"]["eval_workers"] == 1,
    "eval.timeout_s": lambda r: r["log"]["eval_timeout_s"] == 33,
    "algorithm": lambda r: (r["folder"] / "data_report.json").is_file(),
    "model.weights": lambda r: r["continued"].weights == str(r["folder"] / "checkpoints" / "00000004"),
    "teacher.weights": lambda r: r["continued"].teacher == r["continued"].weights,
    "resolved.weights": lambda r: r["continued"].weights is not None,
    "resolved.weights_digest": lambda r: r["continued"].weights_digest is not None,
    "resolved.teacher": lambda r: r["continued"].teacher is not None,
    "resolved.teacher_digest": lambda r: r["continued"].teacher_digest == r["continued"].weights_digest,
    "resolved.data": lambda r: yaml.safe_load((r["folder"] / "config.yaml").read_text())["resolved"]["data"] is not None,
}
