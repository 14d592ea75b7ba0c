"""What a run says of itself: whether training made the model worse, and what its format alone is worth."""

import math

import pytest

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.evaluate.estimates import wilson
from jaxreason.train import worse


def measured(right, count):
    low, high = wilson(right, count)
    return {"eval_accuracy": right / count, "eval_accuracy_low": low, "eval_accuracy_high": high, "eval_truncated_fraction": 0.25}


def test_newcombe_s_own_example():
    """Newcombe 1998, table II: 56 of 70 against 48 of 80 is 0.2 with method 10's interval 0.0524 to 0.3339."""
    found = worse.change(measured(48, 80), measured(56, 70))
    assert found["eval_change"] == pytest.approx(0.2)
    assert (found["eval_change_low"], found["eval_change_high"]) == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(("after", "said"), [(48, False), (30, True), (70, False), (42, False)])
def test_a_run_says_loudly_what_it_made_worse(after, said, capsys):
    """Of 80 problems: 48 before. 42 is fewer, but within the interval."""
    worse.warn(measured(48, 80), measured(after, 80))
    out = " ".join(capsys.readouterr().out.split())
    assert ("WARNING: training made this model worse. Held-out accuracy fell from 60.0% to 37.5%" in out) is said
    assert ("answers cut off: 25.0% before" in out) is said


def test_what_was_not_measured_is_not_compared(capsys):
    assert worse.change({}, measured(1, 2)) == {} == worse.change({"eval_loss": 1.0}, {"eval_loss": math.inf})
    worse.warn({"eval_loss": 1.0}, {"eval_loss": 2.0})
    assert capsys.readouterr().out == ""


def test_the_control_is_the_same_run_with_format_rewards_alone():
    words = ["reward.functions=[{name: accuracy, weight: 2.0}, {name: format, weight: 0.5, options: {template: r1}}]"]
    config = cfg.load("grpo", words)
    found = cfg.control(config)
    assert [(term.name, term.weight, term.options) for term in found.reward.functions] == [("format", 0.5, {"template": "r1"})]
    changed = cfg.differences(config.model_dump(mode="json"), found.model_dump(mode="json"))
    assert changed.keys() == {"run.name", "reward.functions"} and found.run.name == f"{config.run.name}-control"
    plain = cfg.control(cfg.load("grpo", ["reward.functions=[{name: accuracy}]"]))
    assert [term.name for term in plain.reward.functions] == ["format"]
    with pytest.raises(UserError, match="supervised fine-tuning has no reward"):
        cfg.control(cfg.load("sft"))
