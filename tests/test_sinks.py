"""A resumed run goes on in the same run of Weights & Biases, trackio and MLflow, and in the same TensorBoard folder."""

import sys
import types

import pytest

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.train.sinks import sinks


@pytest.fixture
def asked(monkeypatch):
    """What the packages, none of which need be installed, are asked for."""
    calls: dict[str, list] = {"init": [], "log": [], "writer": [], "scalar": [], "start": [], "closed": []}

    class Writer:
        def __init__(self, folder, purge_step):
            calls["writer"].append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls["scalar"].append((name, value, step))

        def close(self):
            calls["closed"].append("tensorboard")

    def started(**options):
        calls["start"].append(options)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"id-{len(calls['start'])}"))

    for name in ("wandb", "trackio"):
        package = types.SimpleNamespace(
            init=lambda **options: calls["init"].append(options), log=lambda record, step: calls["log"].append((record, step)),
            finish=lambda name=name: calls["closed"].append(name),
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, name, package)
    mlflow = types.SimpleNamespace(
        set_experiment=lambda name: calls["init"].append(name), start_run=started, log_dict=lambda *_: None,
        log_metrics=lambda record, step: calls["log"].append((record, step)), end_run=lambda: calls["closed"].append("mlflow"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    return calls


def test_a_resumed_run_is_the_same_run_there(asked, tmp_path):
    config = cfg.load("sft", ["train.wandb=reasoning", "run.name=first"])
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        (sink,) = sinks(folder, config, 0)
        sink(3, {"loss": 1.5})
    one, again, other = asked["init"]
    assert one["id"] == again["id"] != other["id"] and one["id"]
    assert (one["project"], one["name"], one["resume"]) == ("reasoning", "first", "allow")
    assert one["config"]["train"]["wandb"] == "reasoning"
    assert asked["log"] == [({"loss": 1.5}, 3)] * 3


def test_tensorboard_drops_the_steps_that_are_run_again(asked, tmp_path):
    (sink,) = sinks(tmp_path, cfg.load("sft", ["train.tensorboard=true"]), 7)
    sink(8, {"loss": 2.0})
    assert asked["writer"] == [(str(tmp_path / "tensorboard"), 8)] and asked["scalar"] == [("loss", 2.0, 8)]


def test_trackio_goes_on_under_the_same_name(asked, tmp_path):
    config = cfg.load("sft", ["train.trackio=board", "run.name=first"])
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        folder.mkdir(exist_ok=True)
        (sink,) = sinks(folder, config, 0)
        sink(3, {"loss": 1.5})
        sink.close()
    one, again, other = asked["init"]
    assert one["name"] == again["name"] != other["name"] and one["name"].startswith("first-")
    assert (one["project"], one["resume"]) == ("board", "allow") and asked["closed"] == ["trackio"] * 3


def test_mlflow_goes_on_in_the_run_whose_id_it_gave(asked, tmp_path):
    config = cfg.load("sft", ["train.mlflow=experiment", "run.name=first"])
    for _ in range(2):
        (sink,) = sinks(tmp_path, config, 0)
    sink(3, {"loss": 1.5, "odd": float("inf")})
    sink.close()
    assert asked["start"] == [{"run_name": "first"}, {"run_id": "id-1"}] and asked["init"] == ["experiment"] * 2
    assert asked["log"] == [({"loss": 1.5}, 3)] and asked["closed"] == ["mlflow"]


def test_nothing_is_asked_for_by_default(asked, tmp_path):
    assert sinks(tmp_path, cfg.load("sft"), 0) == [] and not any(asked.values())


@pytest.mark.parametrize(("word", "package"), [("train.wandb=x", "wandb"), ("train.tensorboard=true", "tensorboardX"),
                                                ("train.trackio=x", "trackio"), ("train.mlflow=x", "mlflow")])  # fmt: skip
def test_a_missing_package_is_named_with_the_command(word, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package: pip install {package}"):
        sinks(tmp_path, cfg.load("sft", [word]), 0)
