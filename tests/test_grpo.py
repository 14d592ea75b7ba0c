"""GRPO runs: resume is bitwise, clipping bites when it should, failing graders are named and counted."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import final_params, grpo_words

from jaxreason import checkpoint, cli, losses, model
from jaxreason import config as cfg
from jaxreason.data.prompts import Prompt
from jaxreason.rl.batch import Packed, row_layout
from jaxreason.rl.sequence import Sequence, metrics_of
from jaxreason.sampler import Completion
from jaxreason.sharding import make_mesh, replicated
from jaxreason.train import state as states
from jaxreason.train.optimizer import make
from jaxreason.train.scoring import ScoringModel, moved
from jaxreason.train.step import make_gradient, make_score

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling is what takes the time


def command(*words):
    return [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "grpo", *words]


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    root = tmp_path_factory.mktemp("straight")
    done = subprocess.run(command(*grpo_words(root)), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "grpo"


def test_a_run_records_metrics_and_samples(straight):
    lines = lines_of(straight)
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        assert line["clip_fraction"] == 0.0 and line["ratio_max"] == 1.0  # one update: the ratio is exactly 1
        assert line["sampler_gap_max"] < 1e-4 and line["entropy"] > 0 and line["grad_norm"] > 0
    [rows] = json.loads((straight / "data_report.json").read_text())["sources"]
    assert rows["rows"] == rows["kept"] > 0 and rows["formats"] == {"example": rows["rows"]} and rows["dropped"] == {}
    samples = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6 * 16
    group = [s for s in samples if s["step"] == 3 and s["group"] == 2]
    rewards = np.array([s["reward"] for s in group])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose([s["advantage"] for s in group], expected, rtol=1e-4, atol=1e-5)
    assert len({s["prompt"] for s in group}) == 1


def wait_for(condition, process):
    deadline = time.monotonic() + 240
    while not condition() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)


def test_killed_twice_and_resumed_ends_bitwise_equal(straight, tmp_path):
    words = grpo_words(tmp_path, "train.save_every=1")
    steps = lambda: checkpoint.steps(tmp_path / "grpo" / "checkpoints")  # noqa: E731
    for least, delay in ((1, 0.0), (3, 0.05)):  # right after a save (rollout), and a little later (update)
        process = subprocess.Popen(command(*words), cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL)
        wait_for(lambda least=least: steps() and steps()[-1] >= least, process)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    again = subprocess.run(command(*words), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stdout
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "grpo"), final_params(straight))
    assert [line["step"] for line in lines_of(tmp_path / "grpo")] == list(range(1, 7))
    assert (tmp_path / "grpo" / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def test_two_updates_clip_and_a_constant_reward_moves_nothing(tmp_path):
    words = ["rollout.prompts_per_step=8", "train.steps=2", "optimizer.learning_rate=0.03", "optimizer.warmup_steps=0"]
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path / "a", *words, "train.updates_per_rollout=2")]) == 0
    assert lines_of(tmp_path / "a" / "grpo")[0]["clip_fraction"] > 0
    still = grpo_words(tmp_path / "b", *words, reward="constant")
    assert cli.train(["--config", "grpo", *still]) == 0
    config = cfg.load("grpo", still)
    start = states.create(
        model.preset(config.model.preset, config.model.overrides), make(config.optimizer, 2),
        make_mesh(config.mesh), 0,
    ).params  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "b" / "grpo"), start)
    assert lines_of(tmp_path / "b" / "grpo")[0]["zero_std_fraction"] == 1.0


@pytest.mark.parametrize(("reward", "kind"), [("raises", "raised"), ("hangs", "timeout"), ("nan", "not_finite"),
                                              ("short", "wrong_length")])  # fmt: skip
def test_a_failing_grader_is_named_counted_and_stops_if_asked(reward, kind, tmp_path, capsys):
    from jaxreason import rewards
    from jaxreason.errors import UserError
    from jaxreason.rewards.pool import RewardPool
    from jaxreason.rewards.sample import Sample

    (tmp_path / "graders.py").write_text(__import__("helpers").DIGITS)
    one = Sample("q", "a", "1", 1, 8, False)
    function = rewards.get(f"{tmp_path / 'graders.py'}:{reward}")
    good = rewards.get(f"{tmp_path / 'graders.py'}:constant")
    with RewardPool([(function, 1.0), (good, 1.0)], 1, 0.5, "count") as pool:
        graded = pool.grade([one, one])
    assert {e.kind for e in graded.errors} == {kind} and len(graded.errors) == 2
    assert graded.total == [None, None] and np.isnan(graded.rewards[:, 0]).all() and (graded.rewards[:, 1] == 1).all()
    with RewardPool([(function, 1.0)], 1, 0.5, "stop") as pool, pytest.raises(UserError, match=rf"{reward}.*sample 0"):
        pool.grade([one, one])


def sequence(prompt: int, answer: int, group: int, advantage: float = 0.0, reward: float = 1.0, truncated=False):
    completion = Completion(
        group, 0, np.arange(100, 100 + answer, dtype=np.int32), np.zeros(answer, np.float32),
        np.full(answer, -0.5, np.float32), truncated, 0,
    )  # fmt: skip
    ids = tuple(range(prompt))
    return Sequence(Prompt(ids, "", "1", "", 0), completion, "", group, {}, reward, advantage)


def batch_of(sequences, length: int, rows: int, count: int = 1, mask_truncated: bool = False):
    """Packed, with their advantages, as numpy."""
    packed = Packed.of(sequences, length, rows, count)
    return dataclasses.replace(packed.batch(9, mask_truncated), advantages=packed.field(lambda s: s.advantage))


def test_batch_by_hand():
    """Lengths 5, 3 and 4 (a prompt of n and an answer of m take n + m - 1 positions) in rows of 8."""
    sequences = [sequence(3, 3, 0, 0.5), sequence(2, 2, 0, -0.5), sequence(2, 3, 1, 2.0, truncated=True)]
    batch = batch_of(sequences, 8, 3, mask_truncated=True)
    assert batch.tokens.tolist() == [[0, 1, 2, 100, 101, 0, 1, 100], [0, 1, 100, 101, 9, 9, 9, 9], [9] * 8]
    assert batch.targets.tolist()[0] == [1, 2, 100, 101, 102, 1, 100, 101]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1, 1, 0, 1, 1], [0] * 8, [0] * 8]
    assert batch.advantages.tolist()[0] == [0, 0, 0.5, 0.5, 0.5, 0, -0.5, -0.5]
    assert batch.positions.tolist()[0] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.segment_ids.tolist()[0] == [1, 1, 1, 1, 1, 2, 2, 2]
    assert batch.group_tokens.tolist()[0] == [0, 0, 5, 5, 5, 0, 5, 5]


def test_packed_rows_fill_the_first_microbatches():
    places = row_layout([8, 8, 8], 8, rows=8, microbatches=4)
    assert sorted(r % 4 for r, _ in places) == [0, 0, 1] and len(set(places)) == 3


def test_no_reward_is_no_zero():
    found = metrics_of([sequence(1, 1, 0, reward=r) for r in (1.0, 0.0, math.nan)], ())
    assert found["reward"] == 0.5 and found["no_reward_fraction"] == pytest.approx(1 / 3)
    batch = batch_of([sequence(2, 2, 0, reward=math.nan)], 8, 1)
    assert batch.loss_mask.sum() == 0


def test_microbatches_skipped_and_run_give_one_gradient_and_score():
    """Packed into few rows and split any way, empty microbatches included, gradient and scores are the same."""
    config = model.make_config(
        vocab_size=128, embed_dim=32, mlp_dim=48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, init_std=0.2
    )
    params = model.init(config, jax.random.key(0))
    sequences = [sequence(3 + i % 4, 2 + i % 5, i // 4, advantage=(-1.0) ** i * (1 + i) / 16) for i in range(16)]
    loss = losses.get("grpo", kl_coef=0.0)
    found = []
    for rows, length, count in ((16, 16, 1), (16, 16, 4), (16, 32, 16)):
        batch = jax.tree.map(jnp.asarray, batch_of(sequences, length, rows, count))
        value, metrics, grads, _ = jax.jit(make_gradient(config, loss, count, 0.7))(params, batch)
        stats = jax.jit(make_score(config, count, 0.7))(params, batch)
        logp = np.asarray(stats.logp)[np.asarray(batch.loss_mask) > 0]
        found.append((value, metrics, grads, np.sort(logp)))
    for value, metrics, grads, logp in found[1:]:
        np.testing.assert_allclose(value, found[0][0], atol=1e-6)
        np.testing.assert_allclose(metrics["entropy"], found[0][1]["entropy"], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, found[0][2])
        np.testing.assert_allclose(logp, found[0][3], atol=1e-5)


def test_one_update_is_reinforce():
    config = model.make_config(
        vocab_size=128, embed_dim=32, mlp_dim=48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, init_std=0.2
    )
    params = model.init(config, jax.random.key(0))
    sequences = [sequence(3, 2 + i % 5, i // 4, advantage=(-1.0) ** i * (1 + i)) for i in range(8)]
    batch = jax.tree.map(jnp.asarray, batch_of(sequences, 32, 8))
    grads = [
        jax.jit(make_gradient(config, losses.get(name, reduce="token-mean"), 1))(params, batch)[2]
        for name in ("grpo", "reinforce")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), *grads)


def test_corrections_a_teacher_and_an_adaptive_bonus_in_one_run(straight, tmp_path):
    """The second layer doubles the sequences; a teacher that is the starting policy adds next to nothing at first."""
    words = grpo_words(
        tmp_path, f"model.weights={straight}", "model.preset=null", "model.overrides={}", "second_turn.samples=2",
        "second_turn.train=all", f"teacher.weights={straight}", "entropy.target=100", "entropy.coef=0.01", "train.steps=2",
        "train.save_every=1", "kl.coef=0.1", "loss.name=rloo", "eval.problems=4", "eval.max_completion_tokens=8",
        "model.compute_dtype=float32", "kl.offload=true",
    )  # fmt: skip
    assert cli.train(["--config", "grpo", *words]) == 0
    first, one, two = lines_of(tmp_path / "grpo")
    assert {"eval_accuracy_t1", "eval_accuracy_t2"} <= first.keys() and first["step"] == 0
    assert one["accuracy_t1"] == 0.0 and one["uncorrected"] == 0.0 and one["kl"] == pytest.approx(0.0, abs=1e-4)
    assert one["entropy_coef"] == 0.01 and two["entropy_coef"] == pytest.approx(0.01 + 0.005)
    samples = [json.loads(line) for line in (tmp_path / "grpo" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * (16 + 32)
    layer = [s for s in samples if s["step"] == 1 and s["group"] >= 4]
    assert sorted({s["group"] for s in layer}) == list(range(4, 20)) and len(layer) == 32


def test_a_reference_moves_by_its_weight_and_keeps_its_dtype():
    """0.6 of 4 and 0.4 of -1 are 2; with weight 1 it is the policy, and another array."""
    reference, policy = {"w": jnp.full(3, -1.0, jnp.bfloat16)}, {"w": jnp.full(3, 4.0)}
    found = moved(reference, policy, 0.6)["w"]
    assert found.dtype == jnp.bfloat16 and found.tolist() == [2.0] * 3
    same = {"w": jnp.full(3, -1.0)}
    whole = moved(same, policy, 1.0)["w"]
    policy["w"].delete()  # as a donated buffer is
    assert whole.tolist() == [4.0] * 3


def test_a_reference_that_is_not_there_is_not_refreshed(tmp_path, capsys):
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, "kl.refresh_every=2")]) == 2
    assert "kl.refresh_every: there is no reference to refresh" in capsys.readouterr().err


def test_an_offloaded_model_lives_on_the_host_and_is_lent_to_the_devices():
    mesh = make_mesh(cfg.Mesh())
    weights = jax.device_put(np.arange(16.0), replicated(mesh))
    frozen = ScoringModel(None, {"w": weights}, offload=True)
    assert frozen._params["w"].sharding.memory_kind == "pinned_host"
    lent = frozen.params()["w"]
    assert lent.sharding == weights.sharding
    np.testing.assert_array_equal(lent, weights)
    assert ScoringModel(None, {"w": weights}, offload=False).params()["w"] is weights


def test_a_teacher_of_another_vocabulary_is_refused(straight, tmp_path, capsys):
    words = grpo_words(tmp_path, f"teacher.weights={straight}", "model.overrides={vocab_size: 400}")
    assert cli.train(["--config", "grpo", *words]) == 2
    assert "teacher.weights" in capsys.readouterr().err
