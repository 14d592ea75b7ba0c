"""The kinds of run, and what a resumed one may change."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from jaxreason.config.grpo import GrpoConfig
from jaxreason.config.schema import SftConfig
from jaxreason.config.text import read_yaml
from jaxreason.errors import UserError

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
        "train.max_skipped_updates",
        "train.profile_steps",
        "train.tensorboard",
        "train.wandb",
        "train.trackio",
        "train.mlflow",
        "eval",
        "mesh",
        "resolved",
    }
)


# Keys of older releases, dotted, and what they are called now. A key that is new means, by its default, what was done before
# there was it: so an older run is read with the defaults of what it does not say.
RENAMED = {"correction": "second_turn"}


def read_run(path: Path) -> dict[str, Any]:
    """The config.yaml that a run wrote, as it would be written today: renamed keys moved, new ones with their defaults.

    Raises UserError where the file is damaged, or another program's.
    """
    found = read_yaml(path.read_bytes(), str(path))
    if not isinstance(found, dict) or not {"algorithm", "run"} <= found.keys():
        raise UserError(f"{path} is not the config of a run: it is another program's, or it is damaged")
    for old, new in RENAMED.items():
        if old in found:
            found[new] = found.pop(old)
    kind = ALGORITHMS.get(str(found["algorithm"]))
    return with_defaults(found, kind) if kind else found


def with_defaults(values: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """``values`` with every key that ``section`` has and they lack, at its default; keys that it does not know stay."""
    done = dict(values)
    for name, field in section.model_fields.items():
        key = field.alias or name
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            there = values.get(key, {})
            done[key] = with_defaults(there, inner) if isinstance(there, dict) else there
        elif key not in done and not field.is_required():
            done[key] = to_jsonable_python(field.get_default(call_default_factory=True), by_alias=True)
    return done


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of the dotted ``key``."""
    return key in RESUMABLE or key.split(".")[0] in RESUMABLE
