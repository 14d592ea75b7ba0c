"""What stands around the steps of a run: saving before evaluating, resuming, what a resumed run may change, what names meant."""

import json
import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from helpers import final_params, grpo_words, sft_words

from jaxreason import checkpoint, cli
from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.rl import held_out
from jaxreason.sampler.engine import generation
from jaxreason.train import sft
from jaxreason.train.loop import Loop
from jaxreason.train.setup import _source


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def train(name: str, words: list[str]) -> int:
    return cli.train(["--config", name, *words])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Eight SFT steps with a held-out loss every four, which nothing disturbed."""
    root = tmp_path_factory.mktemp("straight")
    assert train("sft", sft_words(root, "data.eval_rows=8", "train.eval_every=4", "train.save_every=4")) == 0
    assert (root / "sft" / "report.html").is_file()
    return root


def test_an_evaluation_that_fails_at_the_end_loses_nothing(straight, tmp_path, monkeypatch):
    """The last step is saved before it is evaluated; the same command then evaluates it and ends as if nothing had been."""
    words = sft_words(tmp_path, "data.eval_rows=8")
    calls = []

    def fails(self, state):
        calls.append(int(state.step))
        raise UserError("the grader is out of order")

    with monkeypatch.context() as patched:
        patched.setattr(sft.HeldOut, "__call__", fails)
        assert train("sft", words) == 2
    run = tmp_path / "sft"
    assert calls == [8] and checkpoint.steps(run / "checkpoints") == [8] and not (run / "summary.json").exists()
    assert [line["step"] for line in lines_of(run)] == list(range(1, 9)) and "eval_loss" not in lines_of(run)[-1]
    assert train("sft", words) == 0
    assert [line["step"] for line in lines_of(run)] == list(range(1, 9))
    undisturbed = summary_of(straight / "sft")
    for found in (lines_of(run)[-1], summary_of(run)):
        assert found["eval_loss"] == undisturbed["eval_loss"] and found["loss"] == undisturbed["loss"]
    jax.tree.map(np.testing.assert_array_equal, final_params(run), final_params(straight / "sft"))


def test_a_finished_run_that_lost_its_summary_writes_it_again(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "copy")
    run = tmp_path / "copy" / "sft"
    before = summary_of(run)
    (run / "summary.json").unlink()
    assert train("sft", sft_words(tmp_path / "copy", "data.eval_rows=8", "train.eval_every=4", "train.save_every=4")) == 0
    after = summary_of(run)
    assert after.pop("train_seconds") == pytest.approx(before.pop("train_seconds"), abs=60)
    assert before["compilations"] > 0 and before["compile_seconds"] > 0
    for name in ("compilations", "compilations_cached", "compile_seconds"):
        del before[name], after[name]  # of the process that wrote it
    assert after == before


def test_a_resumed_summary_counts_the_whole_run_and_settings_of_speed_may_change(straight, tmp_path, capsys):
    """Cut back to step 4, then resumed in microbatches, with another remat and evaluation: the same tokens, the same loss."""
    shutil.copytree(straight, tmp_path / "copy")
    run = tmp_path / "copy" / "sft"
    before = summary_of(run)
    shutil.rmtree(run / "checkpoints" / "00000008")
    changed = ["train.microbatch_size=8", "mesh.fsdp=4", "mesh.data=2", "model.remat=full", "eval.slots=3"]
    changed += ["train.eval_every=2", "train.save_every=0"]
    assert train("sft", sft_words(tmp_path / "copy", "data.eval_rows=8", *changed)) == 0
    assert "from step 4" in capsys.readouterr().out
    after = summary_of(run)
    assert after["trained_tokens"] == before["trained_tokens"] == sum(line["tokens"] for line in lines_of(run))
    assert after["train_seconds"] > 0 and after["loss"] == pytest.approx(before["loss"], rel=1e-4)
    assert [line["step"] for line in lines_of(run) if "eval_loss" in line] == [4, 6, 8]


def test_a_run_whose_data_changed_is_refused(tmp_path, capsys):
    rows = [{"prompt": f"{i} + 1?", "completion": f"It is {i + 1}."} for i in range(40)]
    source = tmp_path / "rows.jsonl"
    words = [w for w in sft_words(tmp_path, "train.steps=4", "train.save_every=2") if not w.startswith("data.max_rows")]
    words.append(f"data.source={source}")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train("sft", words) == 0
    fewer = [*rows[:7], {"prompt": "9 + 9?", "completion": "It is 19."}]
    source.write_text("".join(json.dumps(row) + "\n" for row in fewer))
    (tmp_path / "sft" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "sft" / "checkpoints" / "00000004")
    assert train("sft", words) == 2
    assert f"data.source {source} is not what this run was trained on" in capsys.readouterr().err
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train("sft", words) == 0


def test_a_step_that_trained_nothing_says_zero(tmp_path):
    """No reward for anything: no tokens, and no smallest ratio."""
    words = grpo_words(tmp_path, "train.steps=1", "loss.options.kl_ratio=false", reward="nan")
    assert train("grpo", [w for w in words if "kl_ratio" not in w]) == 0
    (line,) = lines_of(tmp_path / "grpo")
    assert line["tokens"] == 0 and line["trained_tokens_per_second"] == 0 and line["no_reward_fraction"] == 1.0
    assert "ratio_min" not in line and line["loss"] == 0.0 and line["drawn_tokens_per_second"] > 0
    assert summary_of(tmp_path / "grpo")["trained_tokens"] == 0


# ---- what names meant when a run started


def test_the_reference_stays_what_the_run_started_from(tmp_path, capsys):
    """``model.weights=runs/X`` is X's newest checkpoint when the run starts, also once X has been trained on."""
    base = tmp_path / "base"
    assert train("grpo", grpo_words(tmp_path, "run.name=base", "train.steps=1", "train.keep_checkpoints=5")) == 0
    weights = ["model.weights=" + str(base), "model.preset=null", "model.overrides={}"]
    words = grpo_words(tmp_path, *weights, "kl.coef=0.05", "train.steps=2", "train.save_every=1", "train.keep_checkpoints=5")
    assert train("grpo", words) == 0
    run = tmp_path / "grpo"
    resolved = yaml.safe_load((run / "config.yaml").read_text())["resolved"]
    assert resolved["weights"] == str(base / "checkpoints" / "00000001")
    whole = lines_of(run)
    assert whole[0]["kl"] == pytest.approx(0.0, abs=1e-6) and whole[1]["kl"] > 1e-7
    # X goes on: its name now means another model, but not to this run.
    more = grpo_words(tmp_path, "run.name=more", *weights, "train.steps=3", "optimizer.learning_rate=0.05")
    assert train("grpo", more) == 0
    shutil.copytree(tmp_path / "more" / "checkpoints" / "00000003", base / "checkpoints" / "00000003")
    cut(run, 1)
    assert train("grpo", words) == 0
    assert lines_of(run)[1]["kl"] == whole[1]["kl"]
    folder = types.SimpleNamespace(path=run)
    assert str(_source(str(base), folder, cfg.Resolved(**resolved), pinned=False).path) == resolved["weights"]
    # X trained again from the start, or deleted: what the run began with is gone, and it says so.
    for again in (True, False):
        cut(run, 1)
        shutil.rmtree(base / "checkpoints" / "00000001")
        if again:
            shutil.copytree(tmp_path / "more" / "checkpoints" / "00000003", base / "checkpoints" / "00000001")
        assert train("grpo", words) == 2
        assert "the weights that this run found when it started are no longer there" in capsys.readouterr().err


def cut(run: Path, step: int) -> None:
    """Takes a run back to where only the checkpoint of ``step`` was there."""
    for found in checkpoint.steps(run / "checkpoints"):
        if found > step:
            shutil.rmtree(run / "checkpoints" / f"{found:08d}")
    (run / "summary.json").unlink(missing_ok=True)


def test_random_weights_in_bfloat16_are_their_own_reference(tmp_path):
    words = grpo_words(tmp_path, "kl.coef=0.05", "train.steps=1", "model.compute_dtype=bfloat16", "train.freeze=[]")
    assert train("grpo", words) == 0
    # Weights rounded once are not those of the policy, whose products round them too: a thousandth, not a tenth.
    assert abs(lines_of(tmp_path / "grpo")[0]["kl"]) < 2e-3


def test_a_refreshed_reference_and_an_adaptive_kl_resume_bitwise(tmp_path):
    """Right after it was refreshed the reference is the policy; a run that goes on from there finds both in its checkpoint."""
    words = grpo_words(
        tmp_path, "kl.coef=0.1", "kl.target=1e-4", "kl.refresh_every=2", "kl.offload=true", "train.steps=3", "train.save_every=1",
        "optimizer.learning_rate=0.01", "optimizer.warmup_steps=0", "model.compute_dtype=float32", "rollout.prompts_per_step=2",
        "reward.workers=0", "train.keep_checkpoints=3",
    )  # fmt: skip
    assert train("grpo", words) == 0
    run = tmp_path / "grpo"
    whole, lines = final_params(run), lines_of(run)
    assert [line["kl_coef"] for line in lines][:2] == [0.1, 0.1 * 0.98]  # the first policy is the reference
    assert lines[1]["kl"] > 1e-6 and lines[2]["kl"] < 1e-9
    cut(run, 2)
    assert train("grpo", words) == 0
    jax.tree.map(np.testing.assert_array_equal, final_params(run), whole)
    for name in ("kl", "kl_coef", "loss"):
        assert lines_of(run)[2][name] == lines[2][name], name


def test_proximal_sft_compares_with_a_model_that_follows_and_resumes_bitwise(tmp_path, capsys):
    """The loss is -1 wherever the reference is the model itself: in the first step and after each refresh."""
    words = ["loss.name=psft", "train.steps=4", "train.save_every=1", "train.keep_checkpoints=4", "model.compute_dtype=float32"]
    assert train("sft", sft_words(tmp_path, *words)) == 2
    assert "set reference.refresh_every" in capsys.readouterr().err
    words = sft_words(tmp_path, *words, "reference.refresh_every=2", "optimizer.learning_rate=0.01", "optimizer.warmup_steps=0")
    assert train("sft", words) == 0
    run = tmp_path / "sft"
    whole, lines = final_params(run), lines_of(run)
    np.testing.assert_allclose([lines[0]["loss"], lines[2]["loss"]], -1.0, atol=1e-5)
    assert lines[1]["loss"] < -1.01 and lines[3]["loss"] < -1.01
    cut(run, 3)
    assert train("sft", words) == 0
    jax.tree.map(np.testing.assert_array_equal, final_params(run), whole)
    assert lines_of(run)[3]["loss"] == lines[3]["loss"]
    assert train("sft", sft_words(tmp_path, "run.name=plain", "reference.refresh_every=2")) == 2
    assert "loss.name nll compares with no reference" in capsys.readouterr().err


# ---- what does not train


def test_frozen_parameters_stay_take_no_moments_and_resume_bitwise(tmp_path, capsys):
    words = ["train.freeze=[embedding, 'layers.mlp.*']", "train.save_every=4", "optimizer.learning_rate=0.01"]
    assert train("sft", sft_words(tmp_path, *words)) == 0
    run = tmp_path / "sft"
    whole = final_params(run)
    assert train("sft", sft_words(tmp_path, "run.name=all", "train.save_every=4", "optimizer.learning_rate=0.01")) == 0
    everything = final_params(tmp_path / "all")
    start = final_params_at_start(tmp_path)
    for name in ("embedding",):
        np.testing.assert_array_equal(whole[name], start[name])
        assert np.abs(everything[name] - start[name]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, whole["layers"]["mlp"], start["layers"]["mlp"])
    assert all(np.abs(a - b).max() > 0 for a, b in zip(jax.tree.leaves(whole["layers"]["attention"]),
                                                      jax.tree.leaves(start["layers"]["attention"])))  # fmt: skip
    # Not the bytes of the files: how much of its own past a store keeps depends on when its writes met.
    kept = {name: " ".join(json.loads((tmp_path / name / "checkpoints" / "00000008" / "optimizer" / "_METADATA").read_text())
                           ["tree_metadata"]) for name in ("sft", "all")}  # fmt: skip
    assert all(word in kept["all"] for word in ("'embedding'", "'mlp'", "'attention'"))
    assert "'attention'" in kept["sft"] and "'embedding'" not in kept["sft"] and "'mlp'" not in kept["sft"]
    cut(run, 4)
    assert train("sft", sft_words(tmp_path, *words)) == 0
    jax.tree.map(np.testing.assert_array_equal, final_params(run), whole)
    capsys.readouterr()
    assert train("sft", sft_words(tmp_path, "run.name=typo", "train.freeze=[embeding]")) == 2
    assert "no parameter matches 'embeding'; did you mean embedding?" in capsys.readouterr().err


def final_params_at_start(tmp_path: Path) -> dict:
    """The starting weights of these runs: those of one that froze everything but a norm."""
    names = "[embedding, 'layers.*']"
    assert train("sft", sft_words(tmp_path, "run.name=start", f"train.freeze={names}", "train.steps=1")) == 0
    return final_params(tmp_path / "start")


# ---- the second turn


def test_corrections_that_are_all_too_long_are_counted_and_the_step_goes_on(tmp_path, monkeypatch):
    from jaxreason.rl import turns

    again = turns.again

    def long(prompt, completion, phrase, chat, tokenizer):
        found = again(prompt, completion, phrase, chat, tokenizer)
        return found if completion == "" else type(found)(found.ids * 50, found.text, found.gold, found.user, found.index)

    monkeypatch.setattr(turns, "again", long)
    for compare in ("completion", "first"):
        second = ["second_turn.samples=2", f"second_turn.compare={compare}"]
        assert train("grpo", grpo_words(tmp_path, f"run.name={compare}", *second, "train.steps=1")) == 0
        (line,) = lines_of(tmp_path / compare)
        assert line["uncorrected"] == 16.0 and line["accuracy_t2"] == 0.0 and line["tokens"] > 0


def test_grpo_evaluates_once_before_and_drops_the_line_of_a_start_without_a_checkpoint(tmp_path, monkeypatch):
    """A run that died before its first checkpoint starts again, and has one line of step 0."""
    words = grpo_words(tmp_path, "eval.problems=4", "eval.max_completion_tokens=8", "train.steps=2")
    measured = []

    def stub(self, state):
        measured.append(int(state.step))
        return {"eval_accuracy": 0.25 + len(measured) / 100}

    monkeypatch.setattr(held_out.HeldOut, "__call__", stub)
    with monkeypatch.context() as patched:
        patched.setattr("jaxreason.rl.collect.Collector.__call__", lambda *a: (_ for _ in ()).throw(UserError("stop")))
        assert train("grpo", words) == 2
    assert train("grpo", words) == 0
    lines = lines_of(tmp_path / "grpo")
    assert [line["step"] for line in lines] == [0, 1, 2] and measured == [0, 0, 2]
    assert lines[0]["eval_accuracy"] == 0.27 and lines[2]["eval_accuracy"] == 0.28
    assert summary_of(tmp_path / "grpo")["before_eval_accuracy"] == 0.27


def test_sft_from_a_model_measures_it_first_and_says_what_it_lost(straight, tmp_path, monkeypatch, capsys):
    """Step 0 is on record beside the last step; a run from random weights has none."""
    words = [w for w in sft_words(tmp_path, "train.steps=2") if not w.startswith("model.")]
    start = ["model.preset=null", "model.overrides={}", f"model.weights={straight / 'sft'}"]

    def stub(self, state):
        low, high = (0.5, 0.7) if int(state.step) == 0 else (0.1, 0.2)
        return {"eval_accuracy": (low + high) / 2, "eval_accuracy_low": low, "eval_accuracy_high": high}

    monkeypatch.setattr(sft.HeldOut, "__call__", stub)
    assert train("sft", [*words, *start]) == 0
    assert [line["step"] for line in lines_of(tmp_path / "sft")] == [0, 1, 2]
    found = summary_of(tmp_path / "sft")
    assert found["before_eval_accuracy"] == 0.6 and found["eval_accuracy"] == pytest.approx(0.15)
    assert found["eval_change"] == pytest.approx(-0.45) and found["eval_change_high"] < -0.3
    assert "WARNING: training made this model worse" in capsys.readouterr().out
    assert [line["step"] for line in lines_of(straight / "sft")] == list(range(1, 9))


def test_a_control_run_is_asked_for_on_the_command_line(capsys):
    assert cli.train(["--config", "grpo", "--control", "--print-config"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert [term["name"] for term in found["reward"]["functions"]] == ["format"] and found["run"]["name"] == "grpo-control"
    assert cli.train(["--config", "sft", "--control", "--print-config"]) == 2


def test_a_grpo_run_compiles_nothing_after_its_second_step(tmp_path, monkeypatch, compiled):
    """Where the decoding program does for every length, as on cuDNN: however long a run is, its programs are those."""
    monkeypatch.setattr(generation, "one_length", lambda config: True)
    counts, end = [], Loop.end
    monkeypatch.setattr(Loop, "end", lambda self, *given: (end(self, *given), counts.append(dict(compiled)))[0])
    # Sixteen sequences in eight slots: slots are refilled.
    words = ["kl.coef=0.1", "train.updates_per_rollout=2", "train.minibatches=2", "rollout.max_completion_tokens=48"]
    assert train("grpo", grpo_words(tmp_path, *words, "train.steps=5")) == 0
    assert len(counts) == 5 and counts[1] == counts[3]  # the last step's save slices arrays
    # The programs with the network in them: policy and reference score batches of other fields. What an earlier test of the
    # same process compiled is not compiled again.
    most = {"step": 1, "score": 2, "fill": 1, "_decode": 1, "admit": 1, "_copy_one": 1}
    found = {name: counts[3].get(f"jit({name})", 0) for name in most}
    assert found["step"] == 1 and all(found[name] <= most[name] for name in most), found
