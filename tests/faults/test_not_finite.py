"""A loss or gradient that is not finite: the run stops, or skips the update; its batch is kept and can be run again."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import grpo_words, sft_words

from jaxreason import checkpoint, cli, losses
from jaxreason import config as cfg
from jaxreason.model import init, preset
from jaxreason.train import not_finite, sft
from jaxreason.train import optimizer as opt
from jaxreason.train.step import make_train_step
from jaxreason.types import Batch, TeacherView, TrainState

BAD = 3  # the update whose batch is poisoned


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]


def test_a_bound_ends_the_run_after_saving_and_a_larger_one_goes_on(monkeypatch, tmp_path, capsys):
    """Row 2 of the batches of updates 3 and 4 has NaN for a mask. With 0 the state before the bad batch is there to look at."""
    count, put = [0], sft.put

    def poisoned(batch, mesh):
        count[0] += 1
        if count[0] in (BAD, BAD + 1):
            batch.loss_mask[2] = np.nan
        return put(batch, mesh)

    monkeypatch.setattr(sft, "put", poisoned)
    words, run = sft_words(tmp_path), tmp_path / "sft"
    assert cli.train(["--config", "sft", *words, "train.max_skipped_updates=0"]) == 2
    said = capsys.readouterr().err
    assert f"step {BAD}: loss is nan" in said and "train.max_skipped_updates is 0" in said
    assert f"python scripts/replay.py {run} --update {BAD}" in said
    assert checkpoint.steps(run / "checkpoints") == not_finite.updates(run) == [BAD]
    assert cli.replay([str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"of update {BAD}" in shown and "updates before" not in shown and "layers.attention" in shown
    assert "loss_mask is not finite in row 2" in shown and "row 2" in shown and "row 1" not in shown
    assert cli.train(["--config", "sft", *words, "train.max_skipped_updates=2"]) == 0
    lines = lines_of(run)
    assert [line["skipped_updates"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert lines[BAD - 1]["tokens"] == 0 and "loss" not in lines[BAD - 1] and np.isfinite(lines[BAD + 1]["loss"])
    assert json.loads((run / "summary.json").read_text())["skipped_updates"] == 2
    assert cli.replay([str(run), "--update", "7"]) == 2 and "no batch of update 7" in capsys.readouterr().err


def steps_and_state():
    """The step without and with skips, of a tiny bfloat16 model with bfloat16 moments, a state and a batch of two rows."""
    model = preset("embedded-tiny", {"num_layers": 1, "embed_dim": 32, "mlp_dim": 48}).replace(param_dtype="bfloat16")
    settings = cfg.Optimizer(moment_dtype="bfloat16", weight_decay=0.1)
    optimizer, nll = opt.make(settings, 9), losses.get("nll")
    params = init(model, jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params))
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    places = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    batch = Batch(tokens, tokens + 1, places, np.ones_like(tokens), np.ones((2, 16), np.float32))
    steps = [make_train_step(model, nll, optimizer, opt.schedule(settings, 9), 1, skips=skips) for skips in (False, True)]
    return steps, state, batch


def test_a_skipped_update_leaves_parameters_and_moments_bit_for_bit():
    (plain, skipping), state, batch = steps_and_state()
    plain, skipping = jax.jit(plain), jax.jit(skipping)
    first, *_ = skipping(state, batch)
    jax.tree.map(np.testing.assert_array_equal, first, plain(state, batch)[0])  # a good step is the same step
    bad = Batch(batch.tokens, batch.targets, batch.positions, batch.segment_ids, batch.loss_mask.copy())
    bad.loss_mask[1, 3] = np.nan
    second, metrics, _ = skipping(first, bad)
    assert not not_finite.is_finite(jax.device_get(metrics))

    def schedules(opt_state) -> list[int]:
        return [int(part.count) for part in opt_state if isinstance(part, optax.ScaleByScheduleState)]

    assert (int(second.step), schedules(second.opt_state), schedules(first.opt_state)) == (2, [2], [1])
    rest = [[x for x in s.opt_state if not isinstance(x, optax.ScaleByScheduleState)] for s in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, (first.params, rest[0]), (second.params, rest[1]))
    third, *_ = skipping(second, batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(third.params)) and rest[0][1].mu is not None
    assert np.isnan(jax.tree.leaves(plain(first, bad)[0].params)[0]).any()  # what would have been


def test_without_the_key_the_program_is_what_it_was():
    """The default run's step asks nothing of being finite: its program has no such operation."""
    steps, state, batch = steps_and_state()
    counts = [str(jax.make_jaxpr(step)(state, batch)).count("is_finite") for step in steps]
    losses_own = str(jax.make_jaxpr(lambda: opt.stochastic_round(jnp.ones(3), jnp.zeros(2, jnp.uint32)))()).count("is_finite")
    assert losses_own == 1 and counts[1] == counts[0] + 2


def test_a_kept_batch_comes_back_as_it_was(tmp_path):
    ints, reals = np.arange(6, dtype=np.int32).reshape(2, 3), np.float32([[1, np.nan, 3], [np.inf, 5, 6]])
    view = TeacherView(ints, ints + 1, ints + 2, ints + 3, reals)
    batch = Batch(ints, ints, ints, ints, reals, advantages=reals * 2, teacher=view, extras={"mine.too": reals})
    not_finite.save(tmp_path, 12, jax.tree.map(jnp.asarray, batch))
    assert not_finite.updates(tmp_path) == [12]
    jax.tree.map(np.testing.assert_array_equal, not_finite.load(tmp_path, 12), batch)


def test_a_reward_that_explodes_is_skipped(tmp_path, capsys):
    """Rewards of 3e38 make advantages of which the gradient's norm is infinite; the batch is kept and says so."""
    words = grpo_words(tmp_path, "train.max_skipped_updates=5", "train.steps=2", "advantage.name=center", reward="explodes")
    with open(tmp_path / "graders.py", "a") as file:
        file.write("\ndef explodes(sample):\n    return 3e38 * digits(sample)\n")
    assert cli.train(["--config", "grpo", *words]) == 0
    run, said = tmp_path / "grpo", capsys.readouterr().out
    assert not_finite.updates(run) == [1, 2] and "skipped (2 of at most 5)" in said.replace("\n", " ")
    assert [line["skipped_updates"] for line in lines_of(run)] == [1, 2]
    assert cli.replay([str(run), "--update", "1"]) == 0
    shown = capsys.readouterr().out
    assert "inf" in shown and "row 0" in shown
