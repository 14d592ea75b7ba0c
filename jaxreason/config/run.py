"""The kinds of run, and what a resumed one may change."""

from jaxreason.config.grpo import GrpoConfig
from jaxreason.config.schema import SftConfig

RunConfig = SftConfig | GrpoConfig
ALGORITHMS: dict[str, type[RunConfig]] = {"sft": SftConfig, "grpo": GrpoConfig}

# Keys and sections that a resumed run may change: they move where and how fast it runs, and what is measured of it, not
# what it computes (apart from the rounding of sums in another order).
RESUMABLE = frozenset(
    {
        "run.dir",
        "run.deterministic",
        "model.attention",
        "model.remat",
        "model.scan_layers",
        "data.workers",
        "data.cache_dir",
        "rollout.slots",
        "rollout.offload_state",
        "reward.workers",
        "kl.offload",
        "teacher.offload",
        "train.microbatch_size",
        "train.save_every",
        "train.keep_checkpoints",
        "train.eval_every",
        "train.profile_steps",
        "train.tensorboard",
        "train.wandb",
        "eval",
        "mesh",
        "resolved",
    }
)


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of the dotted ``key``."""
    return key in RESUMABLE or key.split(".")[0] in RESUMABLE
