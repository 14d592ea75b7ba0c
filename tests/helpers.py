"""Small things that several tests make: configs of runs that take seconds, and the parameters that they end with."""

from pathlib import Path

import jax
import numpy as np

from jaxreason import checkpoint
from jaxreason import config as cfg
from jaxreason.sharding import make_mesh
from jaxreason.weights import Source

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
    source = Source("checkpoint", run / "checkpoints" / f"{step:08d}")
    params = source.params(source.config("float32", "float32"), make_mesh(cfg.Mesh(), jax.devices()[:1]))
    return jax.tree.map(np.asarray, params)
