"""A sampler, a loss, rewards, an advantage estimator and a hook, all in a user's file: a run with no edit in jaxreason."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import grpo_words

from jaxreason import cli, model
from jaxreason import config as cfg
from jaxreason.data import tokenizer as tokenizers
from jaxreason.errors import UserError
from jaxreason.rl import shapes
from jaxreason.rl.objective import objective_of
from jaxreason.sampler import Engine, Sampling, make
from jaxreason.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[1]
OWN = '''
from __future__ import annotations

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np

from jaxreason import losses, rewards
from jaxreason.sampler import Completion

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass
class Scripted:
    """Sample s of every prompt is the token 100 + s, s + 2 times; the last one is cut off."""

    stop: int
    step: int = -1

    def load(self, params, step):
        assert "layers" in params  # the whole model, as training holds it
        self.step = step

    def release(self):
        self.step = -1

    def memory_bytes(self, longest_prompt, job):
        return 0

    def generate(self, prompts, job, progress=None):
        with open(HERE / "jobs.jsonl", "a") as file:
            file.write(json.dumps({"draw": job.draw, "seed": job.seed, "first": job.first_prompt, "slots": job.slots,
                                   "step": self.step, "prompts": len(prompts), "samples": job.samples}) + "\\n")
        found = []
        for p in range(len(prompts)):
            for s in range(job.samples):
                cut = s == job.samples - 1
                tokens = np.array([100 + s] * (s + 2) + ([] if cut else [self.stop]), np.int32)
                logp = np.full(len(tokens), -2.0 - s, np.float32)
                found.append(Completion(p, s, tokens, logp, logp - 1.0, cut, self.step))
        return found


def sampler(model, stop_ids, mesh):
    return Scripted(stop_ids[0])


def unfinished(model, stop_ids, mesh):
    return {}


@rewards.reward(fills=("token_reward",))
def length(sample):
    return rewards.Scored(float(len(sample.tokens)), {"token_reward": [float(i) for i in range(len(sample.tokens))]})


def truncated(sample):
    return float(sample.truncated)


@losses.estimator(fills=("rank",))
def ranked(rewards_P_G, lengths_P_G):
    order = np.argsort(np.argsort(rewards_P_G, axis=1), axis=1)
    return order - order.mean(axis=1, keepdims=True), {
        "rank": [[np.full(int(n), r) for n, r in zip(row, ranks)] for row, ranks in zip(lengths_P_G, order)]
    }


def depth(sequences_P_G):
    return {"depth": [[np.full(len(s.tokens), len(s.text)) for s in group] for group in sequences_P_G]}
depth.fills = ("depth",)


@losses.loss(kind="policy", needs=("token_reward", "rank", "depth", "old_entropy", "step", "sampler_logp"))
def own(inputs):
    inputs, _ = losses.clean(inputs)
    weights = (inputs.mask > 0) / inputs.totals.tokens
    mean = lambda x: jnp.sum(weights * x)
    return -mean(inputs.logp * inputs.advantages), {
        **{f"mean_{name}": mean(inputs.extras[name]) for name in ("token_reward", "rank", "depth", "old_entropy", "step")},
        "mean_sampler": mean(inputs.sampler_logp),
    }


def against(inputs):
    inputs, _ = losses.clean(inputs)
    weights = (inputs.mask > 0) / inputs.totals.tokens
    value = jnp.sum(weights * inputs.logp * (inputs.ref_logp - inputs.advantages))
    return value, {"mean_ref": jnp.sum(weights * inputs.ref_logp)}
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of two prompts with four scripted samples each, in two minibatches of one update."""
    root = tmp_path_factory.mktemp("own")
    own = root / "own.py"
    own.write_text(OWN)
    words = [w for w in grpo_words(root) if not w.startswith("reward.functions")]
    words += [
        f"rollout.sampler={own}:sampler", f"loss.name={own}:own", f"advantage.name={own}:ranked",
        f"rollout.hooks=['{own}:depth']",
        f"reward.functions=[{{name: '{own}:length', weight: 0.5}}, {{name: '{own}:truncated', weight: 3}}]", "train.steps=2",
        "rollout.prompts_per_step=4", "train.updates_per_rollout=2", "train.minibatches=2", "run.seed=5",
        "optimizer.schedule=linear", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.008",
    ]  # fmt: skip
    assert cli.train(["--config", "grpo", *words]) == 0
    return root, words


def test_a_run_with_everything_of_ones_own_by_hand(run):
    root, _ = run
    first, second = [json.loads(line) for line in (root / "grpo" / "metrics.jsonl").read_text().split("\n") if line]
    # Samples 0, 1, 2 have 3, 4, 5 tokens with their stop, sample 3 has 5 and is cut off.
    counts = np.array([3, 4, 5, 5])
    assert first["completion_tokens"] == counts.mean() and first["truncated_fraction"] == 0.25
    assert first["reward"] == pytest.approx(np.mean(0.5 * counts + 3 * np.array([0, 0, 0, 1])))
    assert first["tokens"] == 4 * counts.sum() / 2  # a mean over the two updates, each of which trains its half
    samples = [json.loads(line) for line in (root / "grpo" / "samples.jsonl").read_text().split("\n") if line]
    assert [s["rewards"] for s in samples[:4]] == [{"length": float(n), "truncated": float(i == 3)} for i, n in enumerate(counts)]
    # Ranks of 1.5, 2, 2.5, 5.5.
    assert [s["advantage"] for s in samples[:4]] == [-1.5, -0.5, 0.5, 1.5]
    # What is graded is the text without its stop token: the last token of a completion that was cut off is text.
    tokenizer = tokenizers.load("embedded")
    assert [s["completion"] for s in samples[:4]] == [tokenizer.decode([100 + s] * (s + 2)) for s in range(4)]
    # Four updates in all, at 8, 6, 4 and 2 thousandths: means of two.
    assert (first["learning_rate"], second["learning_rate"]) == (pytest.approx(0.007), pytest.approx(0.003))
    assert first["mean_old_entropy"] == pytest.approx(first["entropy"], rel=0.05) and first["mean_old_entropy"] > 1
    assert (first["mean_step"], second["mean_step"]) == (pytest.approx(1), pytest.approx(2))


def test_what_was_filled_is_at_its_tokens_in_every_minibatch(run):
    """Means over the tokens of both minibatches, weighed by their tokens: a sum over all tokens by hand."""
    root, _ = run
    first = json.loads((root / "grpo" / "metrics.jsonl").read_text().split("\n")[0])
    from jaxreason.rl.batch import order

    counts, parts = [3, 4, 5, 5] * 4, np.array_split(order(5, 1, 16, 2), 2)

    def mean(value):
        return np.mean([sum(value(i) for i in part) / sum(counts[i] for i in part) for part in parts])

    assert first["mean_token_reward"] == pytest.approx(mean(lambda i: sum(range(counts[i]))), rel=1e-5)
    assert first["mean_rank"] == pytest.approx(mean(lambda i: (i % 4) * counts[i]), rel=1e-5)
    samples = [json.loads(line) for line in (root / "grpo" / "samples.jsonl").read_text().split("\n") if line]
    assert first["mean_depth"] == pytest.approx(mean(lambda i: len(samples[i]["completion"]) * counts[i]), rel=1e-5)
    # The distribution that was sampled, not the one before truncation.
    assert first["mean_sampler"] == pytest.approx(mean(lambda i: (-2.0 - i % 4) * counts[i]), rel=1e-5)


def test_a_sampler_is_told_which_weights_and_which_draw(run):
    root, _ = run
    jobs = [json.loads(line) for line in (root / "jobs.jsonl").read_text().split("\n") if line]
    shared = {"seed": 5, "first": 0, "slots": 8, "prompts": 4, "samples": 4}
    assert jobs == [{"draw": 64, "step": 0, **shared}, {"draw": 128, "step": 2, **shared}]


def test_plan_and_compare_see_the_same_batch(run, tmp_path):
    root, words = run
    config = cfg.load("grpo", words)
    found = shapes.shapes_of(config, objective_of(config).loss, 20, make_mesh(cfg.Mesh()))
    assert found.extras == ("depth", "old_entropy", "rank", "step", "token_reward") and "old_logp" in found.fields
    batch = found.batch(make_mesh(cfg.Mesh()))
    assert {name: x.shape for name, x in batch.extras.items()} == dict.fromkeys(found.extras, (8, found.row_length))
    argv = ["--config", "grpo", "--losses", f"{root / 'own.py'}:own,grpo", "--offline", "--out", str(tmp_path / "out"), *words]
    assert cli.compare(argv) == 0
    rows = json.loads((tmp_path / "out" / "offline.json").read_text())["points"]["start"]["rows"]
    assert rows[0]["grad_norm"] > 0 and rows[1]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("rollout.hooks=[]", "depth"),
        ("advantage.name=grpo", "rank"),
        ("rollout.sampler=vllm", "rollout.sampler 'vllm' is unknown"),
        ("rollout.sampler={own}:depth", "called with (model, stop_ids, mesh): TypeError"),
        ("rollout.sampler={own}:unfinished", "its dict has no method load"),
        ("rollout.sampler={own}:samplr", "did you mean sampler?"),
    ],
)
def test_what_nobody_fills_or_makes_is_refused_at_the_start(run, tmp_path, capsys, change, part):
    _, words = run
    own = tmp_path / "own.py"
    own.write_text(OWN)
    key = change.split("=")[0]
    argv = [w for w in words if not w.startswith((key, "run.dir"))]
    argv += [change.format(own=own), f"run.dir={tmp_path / 'runs'}"]
    assert cli.train(["--config", "grpo", *argv]) == 2
    assert part in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_a_loss_that_reads_the_reference_gets_one_without_a_kl(run, tmp_path):
    """What a loss reads decides what is scored; at the first step the reference is the policy."""
    root, words = run
    argv = [w for w in words if not w.startswith(("loss.name", "rollout.hooks", "run.dir", "train.updates", "train.minibatches"))]
    argv += [f"loss.name={root / 'own.py'}:against", f"run.dir={tmp_path}", "train.steps=1"]
    assert cli.train(["--config", "grpo", *argv]) == 0
    (line,) = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().split("\n") if line]
    assert line["mean_ref"] < -3 and line["kl"] == pytest.approx(0.0, abs=1e-6)


def test_the_example_trains(tmp_path):
    """Of a group's 17 scripted tokens, three end three equal tokens that were there before: of 5 in a row two, of 4 one."""
    shutil.copy(ROOT / "examples" / "token_reward.py", tmp_path / "mine.py")
    mine, own = tmp_path / "mine.py", tmp_path / "own.py"
    own.write_text(OWN)
    words = [w for w in grpo_words(tmp_path, "train.steps=1") if not w.startswith("reward.functions")]
    argv = [f"loss.name={mine}:token_rewarded", f"advantage.name={mine}:centred_with_pass_rate",
            f"reward.functions=[{{name: accuracy}}, {{name: '{mine}:no_repetition', weight: 0.2}}]",
            f"rollout.sampler={own}:sampler"]  # fmt: skip
    assert cli.train(["--config", "grpo", *words, *argv]) == 0
    (line,) = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().split("\n") if line]
    assert line["grad_norm"] > 0 and line["repetition"] == pytest.approx(3 / 17)
    assert line["reward_no_repetition"] == pytest.approx(1 - (2 / 5 + 1 / 5) / 4)


# ---- our own sampler


CONFIG = model.make_config(
    vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, init_std=0.5
)  # fmt: skip


def test_the_engine_behind_the_protocol_draws_what_the_engine_draws():
    from jaxreason.sampler import Job

    mesh = make_mesh(cfg.Mesh(), jax.devices()[:1])
    params = model.init(CONFIG, jax.random.key(0))
    sampling = Sampling(max_completion_tokens=12, top_p=0.5)
    sampler = make("engine", CONFIG, (1,), mesh)
    with pytest.raises(RuntimeError, match="no weights"):
        sampler.generate([[3, 4]], Job(sampling))
    sampler.load(params, 7)
    found = sampler.generate([[3, 4], [5, 6, 7]], Job(sampling, samples=3, seed=2, draw=9, slots=4, first_prompt=1))
    twin = Engine(CONFIG, (1,), sampling, slots=4).generate(
        jax.jit(lambda p: model.unstack(p, CONFIG))(params), [[3, 4], [5, 6, 7]], 3, seed=2, step=9, first_prompt=1
    )
    for a, b in zip(found, twin, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert a.params_step == 7 and (a.prompt_index, a.sample_index) == (b.prompt_index, b.sample_index)
        # Of the mass that top_p leaves, every token has more.
        assert (a.behaviour_logp >= a.policy_logp).all()
    assert np.mean([np.mean(a.behaviour_logp - a.policy_logp) for a in found]) > 0.2
    other = sampler.generate([[3, 4]], Job(sampling, samples=3, seed=2, draw=10, slots=4, first_prompt=1))
    assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(found, other))
    sampler.release()
    with pytest.raises(RuntimeError, match="no weights"):
        sampler.generate([[3, 4]], Job(sampling))


def test_an_unknown_extra_says_who_fills_what():
    config = cfg.load("grpo", [f"loss.name={ROOT}/examples/token_reward.py:token_rewarded"])
    with pytest.raises(UserError, match="pass_rate|token_reward"):
        objective_of(config)
