"""The row's own answer in each group (``rollout.expert``): who judges it, what it counts in, and runs of LUFFY and CHORD."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import grpo_words
from test_advantages import found, sequence, settings
from test_grpo import lines_of

from jaxreason import cli, losses
from jaxreason.compare import gradients, probe
from jaxreason.data import tokenizer
from jaxreason.rl.batch import SHARES, Packed, _share
from jaxreason.rl.objective import find_loss
from jaxreason.rl.shapes import fields_of

WORDS = ["rollout.expert=true", "rollout.max_completion_tokens=64", "train.steps=2", "train.updates_per_rollout=2"]


def samples_of(path):
    return [json.loads(line) for line in (path / "grpo" / "samples.jsonl").read_text().splitlines()]


def test_an_expert_is_judged_by_luffy_alone():
    """The drawn ones earn 1, 0 and 0.5, the expert 2: above their mean by 1.5, and in no mean of theirs."""
    drawn = [sequence(1.0, [-1.0]), sequence(0.0, [-1.0] * 3), sequence(0.5, [-1.0])]
    expert = dataclasses.replace(sequence(2.0, [0.0] * 4), source="expert")
    assert found(settings(loss={"name": "luffy"}, rollout={"expert": True}), [[*drawn, expert]]) == [[0.5, -0.5, 0.0, 1.5]]
    for name in ("grpo", "lite_ppo", "reinforce_pp"):
        config = settings(advantage={"name": name})
        row = found(config, [[*drawn, expert]])[0]
        assert row[3] == 0.0
        for a, b in zip(row, found(config, [drawn])[0]):
            np.testing.assert_array_equal(a, b)


def test_the_shares_of_an_update_by_hand():
    """Of 12 trained tokens the expert has 4 and the policy 8, 3 of them rewarded; one sample has no reward."""
    items = [sequence(1.0, [-1.0] * 3), sequence(0.0, [-1.0] * 5), sequence(np.nan, [-1.0] * 7)]
    items.append(dataclasses.replace(sequence(1.0, [0.0] * 4), source="expert"))
    packed = Packed.of(items, 16, 4, 1)
    found = {name: packed.read(jnp.asarray(_share(packed, belongs, False))) for name, belongs in SHARES.items()}
    expected = {"positive": (4, 0, 0, 0), "expert": (0, 0, 0, 3), "sampled": (1.5, 1.5, 0, 0)}
    for name, values in expected.items():
        assert [set(row.tolist()) for row in found[name]] == [{float(value)} for value in values], name


def test_the_curve_of_a_loss_is_of_a_token_that_the_policy_drew():
    """At ratio 1.5 LUFFY weighs it by 1.5, and CHORD by nothing, beyond the clip; the expert's tokens are other terms."""
    extras = {"expert": np.full((1, 4), 2.0), "sampled": np.full((1, 4), 2.0)}
    batch = types.SimpleNamespace(loss_mask=jnp.ones((1, 4)), extras={k: jnp.asarray(v) for k, v in extras.items()})
    at = int(np.argmin(np.abs(probe.LOG_RATIOS - np.log(1.5))))
    for name, weight in (("luffy", np.exp(probe.LOG_RATIOS[at])), ("chord", 0.0)):
        loss = losses.get(name)
        curve = probe.weight_curve(loss, gradients._means(loss, batch))
        assert curve["positive"][at] == pytest.approx(weight, rel=1e-3) and curve["positive"][80] == pytest.approx(1.0)


def test_the_weight_of_the_data_rises_and_falls():
    """Two steps up to 0.8, four down to 0.2: half of the way up, the top, half of the way down, the valley and on."""
    loss = losses.get("chord", mu=0.8, mu_valley=0.2, mu_warmup_steps=2, mu_decay_steps=4, phi=False)
    one = jnp.ones((1, 1))
    for step, mu in ((1, 0.4), (2, 0.8), (4, 0.5), (6, 0.2), (9, 0.2)):
        extras = {"expert": one, "sampled": 0.0 * one, "step": step * one}
        inputs = losses.PolicyInputs(logp=-one, old_logp=-one, advantages=one, mask=one, extras=extras)
        assert float(loss(inputs)[0]) == pytest.approx(mu), step
    assert "step" not in losses.get("chord").extras


def test_a_run_of_luffy(tmp_path):
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, *WORDS, "loss.name=luffy", "kl.coef=0")]) == 0
    samples, lines = samples_of(tmp_path), lines_of(tmp_path / "grpo")
    assert [s["source"] for s in samples] == [*["policy"] * 3, "expert"] * (2 * 4)
    for i in range(0, len(samples), 4):
        *drawn, expert = samples[i : i + 4]
        assert expert["completion"].startswith("<think>") and expert["gold"] in expert["completion"]
        digits = sum(c.isdigit() for c in expert["completion"]) / len(expert["completion"])
        assert expert["reward"] == pytest.approx(digits)
        base = np.mean([s["reward"] for s in drawn])
        np.testing.assert_allclose([s["advantage"] for s in (*drawn, expert)],
                                   [s["reward"] - base for s in (*drawn, expert)], atol=1e-6)  # fmt: skip
    for line, step in zip(lines, (1, 2)):
        drawn = [s for s in samples if s["step"] == step and s["source"] == "policy"]
        own = [s for s in samples if s["step"] == step and s["source"] == "expert"]
        assert line["completion_tokens"] == pytest.approx(np.mean([s["tokens"] for s in drawn]))
        assert line["reward"] == pytest.approx(np.mean([s["reward"] for s in drawn]))
        assert line["expert_reward"] == pytest.approx(np.mean([s["reward"] for s in own]))
        assert line["tokens"] == sum(s["tokens"] for s in (*drawn, *own)) and line["sampler_gap_max"] < 1e-4


def test_a_run_of_chord_imitates(tmp_path):
    """With mu 1 and no phi it is supervised training on the rows' answers: their likelihood rises, and rewards teach nothing."""
    words = [*WORDS, "loss.name=chord", "loss.options={mu: 1.0, phi: false}", "kl.coef=0", "train.steps=6"]
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, *words, "optimizer.learning_rate=0.01")]) == 0
    losses = [line["loss"] for line in lines_of(tmp_path / "grpo")]
    vocabulary = tokenizer.load(tmp_path / "grpo" / "tokenizer").vocab_size
    assert losses[0] == pytest.approx(np.log(vocabulary), rel=0.1) and losses[-1] < 0.8 * losses[0]
    assert all(s["advantage"] == 0.0 for s in samples_of(tmp_path) if s["source"] == "expert")


def test_the_sampler_s_log_probs_of_an_expert_are_the_policy_s():
    config = settings(loss={"name": "luffy"}, rollout={"expert": True})
    assert "old_logp" in fields_of(config, find_loss(config))
    config = settings(loss={"name": "luffy"})
    assert "old_logp" not in fields_of(config, find_loss(config))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.name=luffy"], "set rollout.expert=true"),
        (["rollout.expert=true"], "use luffy, chord, or a loss that reads expert"),
        (["rollout.expert=true", "loss.name=luffy", "kl.coef=0.1", "kl.placement=reward"], "use kl.placement=loss"),
        (["rollout.expert=true", "loss.name=luffy", "rollout.group_size=1"], "use rollout.group_size 2 or more"),
        (["rollout.expert=true", "loss.name=luffy", "second_turn.samples=2"], "second_turn.samples needs its own"),
        (["rollout.expert=true", "loss.name=luffy", "teacher.weights=start"], "teacher.weights without teacher.divergence needs"),
        (["rollout.expert=true", "loss.name=chord", "loss.options={reduce: token-sum}"], "leave its option reduce at token-mean"),
        (["rollout.expert=true", "loss.name=chord", "loss.options={mu_valley: 0.05}"], "give both or neither"),
    ],
)
def test_what_does_not_go_together_is_said(words, message, tmp_path, capsys):
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, *words), "--dry-run"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
