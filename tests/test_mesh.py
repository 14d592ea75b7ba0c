"""Meshes change where things are and nothing else: steps, checkpoints and rollouts on eight devices and on one."""

import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest

from jaxreason import checkpoint, losses, model
from jaxreason import config as cfg
from jaxreason.data.prompts import Prompt, Prompts, PromptStream, SourceRows
from jaxreason.data.tally import Tally
from jaxreason.rl import collect
from jaxreason.rl.batch import Packed
from jaxreason.rl.sequence import Sequence
from jaxreason.sampler import Completion
from jaxreason.sharding import make_mesh, within
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.setup import put
from jaxreason.train.step import make_train_step
from jaxreason.types import Batch

# Each loss has its own head; one of them is tied to the embedding, and one recomputes what its policy does not keep.
BASE = model.make_config(
    vocab_size=64, embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.2
)
CASES = {
    "nll": ({}, BASE.replace(tie_embeddings=False)),
    "grpo": ({"kl_coef": 0.1, "entropy_coef": 0.01}, BASE.replace(remat="matmuls")),
}
ONE = (1, 1, 1)
# Adam divides by the size of a gradient: where that is near its epsilon, rounding shows in up to a rate of parameter.
SETTINGS = cfg.Optimizer(learning_rate=1e-3, schedule="constant", weight_decay=0.1, max_grad_norm=0.5)
OPTIMIZER = opt.make(SETTINGS, 10)


def mesh_of(sizes):
    return make_mesh(cfg.Mesh(**dict(zip(("data", "fsdp", "tensor"), sizes))), jax.devices()[: int(np.prod(sizes))])


def sequences(seed: int) -> list[Sequence]:
    """24 completions of 6 prompts, of lengths that leave every row another amount of padding."""
    rng, found = np.random.default_rng(seed), []
    for i in range(24):
        prompt, n = rng.integers(0, 64, 3 + i % 4).tolist(), 2 + int(rng.integers(0, 8))
        logp = -rng.random(n).astype(np.float32)
        drawn = Completion(i // 4, i % 4, rng.integers(0, 64, n).astype(np.int32), logp, logp, i % 5 == 0, 0)
        found.append(
            Sequence(
                Prompt(tuple(prompt), "", "", "", i), drawn, "", i // 4, {}, 1.0, float(rng.normal()),
                ref_logp=-rng.random(n).astype(np.float32),
            )
        )  # fmt: skip
    return found


def batch_of(loss: str, seed: int = 0) -> Batch:
    packed = Packed.of(sequences(seed), 18, 24, 3)
    batch = dataclasses.replace(
        packed.batch(0, False), advantages=packed.field(lambda s: s.advantage), ref_logp=packed.field(lambda s: s.ref_logp)
    )
    return batch if loss == "grpo" else Batch(
        batch.tokens, batch.targets, batch.positions, batch.segment_ids, batch.loss_mask, sequence_ids=batch.sequence_ids
    )  # fmt: skip


@functools.cache
def stepper(sizes, loss: str):
    """The step that training jits, in three microbatches of 8 rows; shared by the tests, since compiling is what takes."""
    options, config = CASES[loss]
    mesh = mesh_of(sizes)
    out = (jax.tree.map(lambda s: s.sharding, states.abstract(config, OPTIMIZER, mesh)), None, None)
    step = make_train_step(config, losses.get(loss, **options), OPTIMIZER, opt.schedule(SETTINGS, 10), 3)
    return mesh, within(mesh, jax.jit(step, out_shardings=out))


def run(sizes, loss: str, batches, state=None):
    """(state, metrics of every step) from random weights or from ``state``."""
    mesh, step = stepper(sizes, loss)
    state, found = state or states.create(CASES[loss][1], OPTIMIZER, mesh, seed=1), []
    for seed in batches:
        state, metrics, _ = step(state, put(batch_of(loss, seed), mesh))
        found.append(jax.device_get(metrics))
    return state, found


@functools.cache
def alone(loss: str):
    """Four steps on one device, and the state after the first."""
    first, metrics = run(ONE, loss, [0])
    return first, [*metrics, *run(ONE, loss, [1, 2, 3], first)[1]]


def assert_same(found: dict, wanted: dict):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize("loss", CASES)
def test_one_step_is_the_same_on_every_mesh(sizes, loss):
    state, (metrics,) = run(sizes, loss, [0])
    expected, wanted = alone(loss)
    assert abs(wanted[0]["loss"]) > 1e-3 and wanted[0]["grad_norm"] > 0.5  # and so it is clipped
    assert_same(metrics, wanted[0])
    split = {leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state.params)}
    assert min(split) == 1 / (sizes[1] * sizes[2])  # or nothing was
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("before", "after"), [((1, 8, 1), (2, 2, 2)), ((2, 2, 2), ONE), (ONE, (8, 1, 1))])
def test_a_checkpoint_of_one_mesh_resumes_on_another(tmp_path, before, after):
    config = CASES["nll"][1]
    state, _ = run(before, "nll", [0, 1])
    store = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=1)
    store.save(state, {"next": 2}, config)
    store.wait()
    restored, data = store.restore(2, states.abstract(config, OPTIMIZER, mesh_of(after)))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert data == {"next": 2}
    _, found = run(after, "nll", [2, 3], restored)
    for metrics, wanted in zip(found, alone("nll")[1][2:], strict=True):
        assert_same(metrics, wanted)


# ---- processes


DRAWN = Completion(0, 0, np.zeros(3, np.int32), np.zeros(3), np.zeros(3), False, 0)


class Drawing(collect.Collector):
    """Notes what would be drawn; every third prompt's group teaches nothing."""

    def _draw(self, prompts, job, step, params_step, offset, seconds):
        found = []
        for place, prompt in enumerate(prompts):
            self.pool.append((job.draw - 64 * step, job.first_prompt + place, prompt.index))
            rewards = (1.0, 1.0 if prompt.index % 3 == 0 else 0.0)
            found.append([Sequence(prompt, DRAWN, "", offset + place, {}, reward) for reward in rewards])
        return found, 0


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_processes_draw_together_what_one_draws(monkeypatch, rounds):
    """Two threads for two processes, which after the first round miss different numbers of groups."""
    words = ["rollout.prompts_per_step=8", f"rollout.resample_rounds={rounds}", "rollout.group_size=2"]
    config, asked = cfg.load("grpo", words), tuple(Prompt((1,), "", "", "", i) for i in range(40))
    prompts = Prompts(asked, (SourceRows("any", 1.0, len(asked), Tally()),))
    me, barrier, shared = threading.local(), threading.Barrier(2, timeout=30), {}

    def collector():
        return Drawing(config, None, PromptStream(prompts, 0, False), None, None, [], 9)

    def gather(values):
        shared[me.index] = values
        barrier.wait()
        together = np.concatenate([shared[0], shared[1]])
        barrier.wait()
        return together

    one = collector()
    wanted = one._first_turn(1, 3, 0)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: me.index)
    monkeypatch.setattr(collect.hosts, "gather", gather)
    two, found = [collector(), collector()], {}

    def process(index):
        me.index = index
        found[index] = two[index]._first_turn(1, 3, 0)

    threads = [threading.Thread(target=process, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(two[0].pool + two[1].pool) == sorted(one.pool)
    assert found[0].cursor == found[1].cursor == wanted.cursor == 3 + len(one.pool)
    groups = [group for index in range(2) for group in found[index].groups]
    assert [[s.group for s in group] for group in groups] == [[i, i] for i in range(8)]
    assert sorted(g[0].prompt.index for g in groups) == sorted(g[0].prompt.index for g in wanted.groups)
    missing = [sum(i % 3 == 0 for _, _, i in one.pool[:4]), sum(i % 3 == 0 for _, _, i in one.pool[4:8])]
    assert missing == [2, 1]  # or the rounds show nothing
    if rounds:
        # Of everything that was drawn: a third of the prompts teach nothing, and every sample earns 1 or, if it may, 0.
        flat = np.mean([i % 3 == 0 for _, _, i in one.pool])
        assert wanted.metrics["drawn_zero_std_fraction"] == pytest.approx(flat)
        assert wanted.metrics["drawn_reward"] == pytest.approx(flat + (1 - flat) / 2)
        assert wanted.metrics["drawn_truncated_fraction"] == 0.0
    drawn = {name: value for name, value in wanted.metrics.items() if name.startswith("drawn_")}
    assert drawn.items() <= found[0].metrics.items() and bool(drawn) == (rounds > 0)
