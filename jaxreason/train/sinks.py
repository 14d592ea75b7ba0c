"""Where metrics go in addition to metrics.jsonl: TensorBoard, Weights & Biases, trackio, MLflow."""

import importlib
import math
import uuid
from pathlib import Path
from typing import Any, Protocol

from jaxreason import config as cfg
from jaxreason.errors import UserError


class Sink(Protocol):
    """One such place."""

    def __call__(self, step: int, record: dict[str, float]) -> None:
        """Takes a step's numbers, or more of a step that it has already."""

    def close(self) -> None:
        """Sends what is left."""


def sinks(folder: Path, config: cfg.RunConfig, start: int) -> list[Sink]:
    """What ``train.tensorboard``, ``wandb``, ``trackio`` and ``mlflow`` ask for; a resumed run goes on in the same run there.

    Raises UserError if a package is missing.
    """
    train = config.train
    found: list[Sink] = []
    if train.tensorboard:
        found.append(TensorBoard(_module("tensorboardX", "train.tensorboard=true"), folder, start))
    if train.wandb:
        found.append(Wandb(_module("wandb", f"train.wandb={train.wandb}"), folder, config, train.wandb))
    if train.trackio:
        found.append(Trackio(_module("trackio", f"train.trackio={train.trackio}"), folder, config, train.trackio))
    if train.mlflow:
        found.append(Mlflow(_module("mlflow", f"train.mlflow={train.mlflow}"), folder, config, train.mlflow))
    return found


class TensorBoard:
    """Event files in RUN/tensorboard; the steps that are run again replace those that were written."""

    def __init__(self, package: Any, folder: Path, start: int):
        self._writer = package.SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def __call__(self, step: int, record: dict[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, whose id is kept in RUN/wandb_id."""

    def __init__(self, package: Any, folder: Path, config: cfg.RunConfig, project: str):
        self._package = package
        package.init(
            project=project, name=config.run.name, config=config.model_dump(), id=_kept_id(folder / "wandb_id"), resume="allow"
        )

    def __call__(self, step: int, record: dict[str, float]) -> None:
        self._package.log(record, step=step)

    def close(self) -> None:
        self._package.finish()


class Trackio:
    """A run of trackio, which knows a run by its name: the config's with a piece of an id kept in RUN/trackio_id."""

    def __init__(self, package: Any, folder: Path, config: cfg.RunConfig, project: str):
        self._package = package
        name = f"{config.run.name}-{_kept_id(folder / 'trackio_id')[:8]}"
        package.init(project=project, name=name, config=config.model_dump(mode="json"), resume="allow")

    def __call__(self, step: int, record: dict[str, float]) -> None:
        self._package.log(record, step=step)

    def close(self) -> None:
        self._package.finish()


class Mlflow:
    """A run of MLflow (``MLFLOW_TRACKING_URI`` says where), which gives it an id that is kept in RUN/mlflow_id."""

    def __init__(self, package: Any, folder: Path, config: cfg.RunConfig, experiment: str):
        self._package = package
        package.set_experiment(experiment)
        path = folder / "mlflow_id"
        if path.is_file():
            package.start_run(run_id=path.read_text().strip())
        else:
            path.write_text(package.start_run(run_name=config.run.name).info.run_id)
            package.log_dict(config.model_dump(mode="json"), "config.json")

    def __call__(self, step: int, record: dict[str, float]) -> None:
        # Its database refuses what is not finite.
        self._package.log_metrics({name: value for name, value in record.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._package.end_run()


def _module(name: str, asked: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{asked} needs the package: pip install {name}") from None


def _kept_id(path: Path) -> str:
    """The id of this run folder's run there, made once: without it a resumed run would be a second one."""
    if not path.is_file():
        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()
