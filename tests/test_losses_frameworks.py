"""``loss.preset`` against numbers of the frameworks' own code: values, gradients and advantages of ``data/losses/*.json``.

Each file names its framework's repository, commit, file and functions. A vector holds the settings in the framework's words, the
same in ours, and what the framework's function gave in float64 with these inputs, run outside of this project. ``batches`` are
per-token inputs [6, 8]: ``whole``, ``masked`` (two sequences without a supervised token) and ``far`` (log-ratios to the reference
that clamps meet).
"""

import json
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import losses_cases as cases
import numpy as np
import pytest

from jaxreason import config as cfg
from jaxreason import losses
from jaxreason.errors import UserError
from jaxreason.losses import axes, inputs, presets

FILES = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "data/losses").glob("*.json"))}
FUNCTIONS = [(name, function) for name, file in FILES.items() for function in sorted({v["ours"] for v in file["vectors"]})]


def inputs_of(batch: dict) -> losses.PolicyInputs:
    return losses.PolicyInputs(**{name: jnp.asarray(values, jnp.float32) for name, values in batch.items()})


@pytest.mark.parametrize(("framework", "name"), FUNCTIONS)
def test_value_and_gradient(framework, name):
    """To 1e-5 of the value, and of the gradient's largest entry."""
    for vector in (v for v in FILES[framework]["vectors"] if v["ours"] == name):
        loss = losses.get(name, preset=framework, **vector["options"])
        given = inputs.only(inputs_of(FILES[framework]["batches"][vector["batch"]]), loss.needs)
        value, _, gradient = cases.value_and_grad(loss, given)
        expected = np.array(vector["gradient"])
        what = f"{vector['settings']} {vector['batch']} {vector['options']}"
        np.testing.assert_allclose(value, vector["value"], rtol=1e-5, atol=1e-7, err_msg=what)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=what)


@pytest.mark.parametrize("framework", FILES)
def test_advantages(framework):
    """[P][G], or by token [P][G][n]; ``lengths`` are of completions."""
    for vector in FILES[framework]["advantages"]:
        rewards = np.array(vector["rewards"])
        given = {"lengths_P_G": np.array(vector.get("lengths", np.ones(rewards.shape)))}
        if "rewards_F" in vector:
            given |= {"rewards_F_P_G": np.array(vector["rewards_F"]), "weights_F": np.array(vector["weights"])}
        found, _ = losses.advantage.get(vector["ours"], preset=framework, **vector["options"])(rewards, **given)
        for row, expected in zip(found, vector["result"]):
            for one, other in zip(row, expected):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6, err_msg=str(vector["settings"]))


@pytest.mark.parametrize("framework", FILES)
def test_what_a_framework_has_not_is_refused(framework):
    for case in FILES[framework]["refused"]:
        with pytest.raises(UserError, match=f"loss.preset {framework}"):
            losses.get(case["ours"], preset=framework, **case.get("options", {}))


def test_a_config_may_name_every_preset_and_every_estimator_of_the_kl():
    """Reading a config imports no jax, so it has its own lists."""
    schema = cfg.GrpoConfig.model_json_schema()["$defs"]
    choices = {key: schema[section]["properties"][key]["anyOf"][0]["enum"] for section, key in
               (("GrpoLoss", "preset"), ("Kl", "estimator"))}  # fmt: skip
    assert choices == {"preset": list(presets.PRESETS), "estimator": list(get_args(axes.KlEstimator))}


def test_every_loss_of_every_preset_has_a_vector():
    assert set(FILES) == set(presets.PRESETS)
    for framework, preset in presets.PRESETS.items():
        assert {v["ours"] for v in FILES[framework]["vectors"]} == set(preset.losses), framework
