"""Small things that several tests make: configs of runs that take seconds, and the parameters that they end with."""

from pathlib import Path

import jax
import numpy as np

from jaxreason import checkpoint
from jaxreason import config as cfg
from jaxreason.sharding import make_mesh
from jaxreason.weights import WeightSource

TINY = ["model.overrides={num_layers: 1, embed_dim: 32, mlp_dim: 48, num_heads: 2, num_kv_heads: 1, head_dim: 16}"]


def sft_words(root: Path, *words: str) -> list[str]:
    """Words after ``--config sft`` that make it a run of seconds."""
    return [
        *TINY, f"run.dir={root}", f"data.cache_dir={root / 'cache'}", "data.workers=0", "data.max_rows=300",
        "data.max_length=128", "data.batch_size=8", "data.eval_rows=0", "eval.problems=0", "train.steps=8",
        "train.save_every=0", "optimizer.warmup_steps=2", *words,
    ]  # fmt: skip


def final_params(run: Path) -> dict:
    """Parameters of a run's last checkpoint, as numpy."""
    step = checkpoint.steps(run / "checkpoints")[-1]
    source = WeightSource("checkpoint", run / "checkpoints" / f"{step:08d}")
    params = source.params(source.config("float32", "float32"), make_mesh(cfg.Mesh(), jax.devices()[:1]))
    return jax.tree.map(np.asarray, params)


DIGITS = '''
import os, time

def digits(sample):
    """Share of digits: a reward that random weights earn differently."""
    return sum(c.isdigit() for c in sample.completion) / max(1, len(sample.completion))

def constant(sample):
    return 1.0

def raises(sample):
    raise RuntimeError("grader is out of order")

def hangs(sample):
    time.sleep(60)

def nan(sample):
    return float("nan")

def short(samples):
    return [1.0]
short.batch = True
'''


def grpo_words(root: Path, *words: str, reward: str = "digits") -> list[str]:
    """Words after ``--config grpo`` that make it a run of seconds on random weights."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "graders.py").write_text(DIGITS)
    return [
        *TINY, "model.weights=null", "model.preset=embedded-tiny", f"run.dir={root}", "data.max_rows=50", "train.steps=6",
        "rollout.prompts_per_step=4", "rollout.group_size=4", "rollout.max_completion_tokens=16", "rollout.slots=8",
        "eval.problems=0", "train.save_every=0", "train.eval_every=0", "reward.workers=1",
        f"reward.functions=[{{name: '{root / 'graders.py'}:{reward}'}}]", *words,
    ]  # fmt: skip
