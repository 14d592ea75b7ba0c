"""Where metrics go in addition to metrics.jsonl: TensorBoard and Weights & Biases."""

import uuid
from collections.abc import Callable
from pathlib import Path

from jaxreason import config as cfg
from jaxreason.errors import UserError

Sink = Callable[[int, dict[str, float]], object]


def sinks(folder: Path, config: cfg.RunConfig, start: int) -> list[Sink]:
    """What ``train.tensorboard`` and ``train.wandb`` ask for; a resumed run goes on in the same place.

    Raises UserError if a package is missing.
    """
    found: list[Sink] = []
    if config.train.tensorboard:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError("train.tensorboard=true needs the package: pip install tensorboardX") from None
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        found.append(lambda step, record: [writer.add_scalar(k, v, step) for k, v in record.items()])
    if config.train.wandb:
        try:
            import wandb
        except ImportError:
            raise UserError(f"train.wandb={config.train.wandb} needs the package: pip install wandb") from None
        wandb.init(
            project=config.train.wandb, name=config.run.name, config=config.model_dump(), id=_wandb_id(folder), resume="allow"
        )
        found.append(lambda step, record: wandb.log(record, step=step))
    return found


def _wandb_id(folder: Path) -> str:
    """The id of this run folder's run there, made once: without it a resumed run would be a second one."""
    path = folder / "wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()
