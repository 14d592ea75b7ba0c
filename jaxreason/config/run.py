"""The kinds of run, and what a resumed one may change."""

from jaxreason.config.grpo import GrpoConfig
from jaxreason.config.schema import Section, SftConfig

RunConfig = SftConfig | GrpoConfig
ALGORITHMS: dict[str, type[Section]] = {"sft": SftConfig, "grpo": GrpoConfig}

# Keys that a resumed run may change: they move where and how fast it runs, not what it computes.
RESUMABLE = frozenset(
    {
        "run.dir",
        "run.deterministic",
        "data.workers",
        "data.cache_dir",
        "reward.workers",
        "train.save_every",
        "train.keep_checkpoints",
        "train.profile_steps",
        "train.tensorboard",
        "train.wandb",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
    }
)
