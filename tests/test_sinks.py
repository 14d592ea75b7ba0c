"""A resumed run goes on in the same run of Weights & Biases and the same TensorBoard folder."""

import sys
import types

import pytest

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.train.sinks import sinks


@pytest.fixture
def asked(monkeypatch):
    """What wandb and tensorboardX, neither of which need be installed, are asked for."""
    calls: dict[str, list] = {"init": [], "log": [], "writer": [], "scalar": []}

    class Writer:
        def __init__(self, folder, purge_step):
            calls["writer"].append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls["scalar"].append((name, value, step))

    wandb = types.SimpleNamespace(
        init=lambda **options: calls["init"].append(options), log=lambda record, step: calls["log"].append((record, step))
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
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


def test_nothing_is_asked_for_by_default(asked, tmp_path):
    assert sinks(tmp_path, cfg.load("sft"), 0) == [] and not any(asked.values())


@pytest.mark.parametrize(("word", "package"), [("train.wandb=x", "wandb"), ("train.tensorboard=true", "tensorboardX")])
def test_a_missing_package_is_named_with_the_command(word, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package: pip install {package}"):
        sinks(tmp_path, cfg.load("sft", [word]), 0)
