"""One whole GRPO update against a twin that packs nothing: one sequence at a time, full logits, Adam in numpy.

The twin shares no code with the step apart from the network's ``logits``, which test_torch_parity compares with transformers.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import grpo_words

from jaxreason import config as cfg
from jaxreason import model as models
from jaxreason.data.prompts import Prompt
from jaxreason.errors import UserError
from jaxreason.rl import grpo
from jaxreason.rl.batch import Batcher, order
from jaxreason.rl.objective import objective_of
from jaxreason.rl.samples import of_learner
from jaxreason.rl.sequence import Sequence
from jaxreason.rl.shapes import minibatches_scored, shapes_of
from jaxreason.sampler import Completion
from jaxreason.sharding import make_mesh
from jaxreason.train import optimizer as opt
from jaxreason.train import state as states
from jaxreason.train.scoring import ScoringModel

TEMPERATURE, BETA, CLIP, PAD, LONGEST = 0.7, 0.1, 0.2, 0, 7
RATE, B1, B2, EPS, DECAY, NORM = 0.02, 0.9, 0.95, 1e-2, 0.1, 0.5
WORDS = [
    f"rollout.temperature={TEMPERATURE}", f"kl.coef={BETA}", "rollout.max_completion_tokens=9", "train.updates_per_rollout=4",
    "train.minibatches=2", "train.microbatch_size=2", "train.truncated=mask", "model.compute_dtype=float32",
    f"optimizer.learning_rate={RATE}", "optimizer.schedule=linear", "optimizer.warmup_steps=0", f"optimizer.b1={B1}",
    f"optimizer.b2={B2}", f"optimizer.eps={EPS}", f"optimizer.weight_decay={DECAY}", f"optimizer.max_grad_norm={NORM}",
    "train.steps=3", "model.overrides={num_layers: 1, embed_dim: 32, mlp_dim: 48, num_heads: 2, num_kv_heads: 1, head_dim: 16, "
    "vocab_size: 384, init_std: 0.2}",
]  # fmt: skip


def sequences() -> list[list[Sequence]]:
    """Four groups of four: unequal lengths, two truncated, one without a reward."""
    rng, groups = np.random.default_rng(3), []
    for p in range(4):
        prompt, group = Prompt(tuple(rng.integers(1, 384, 3 + p).tolist()), "", "", "", p), []
        for g in range(4):
            n = int(rng.integers(2, 10))
            tokens, cut = rng.integers(1, 384, n).astype(np.int32), (p, g) in ((0, 1), (2, 3))
            drawn = Completion(p, g, tokens, np.zeros(n), np.zeros(n), cut, 0)
            reward = float("nan") if (p, g) == (3, 2) else float(rng.random())
            group.append(Sequence(prompt, drawn, "", p, {}, reward))
        groups.append(group)
    return groups


def rows_of(part: list[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """ids [n, 16] with one sequence a row and nothing else, and where the next token is one of its completion [n, 15]."""
    ids, answer = np.zeros((len(part), 16), np.int32), np.zeros((len(part), 15), bool)
    for row, where, s in zip(ids, answer, part):
        whole = [*s.prompt.ids, *s.completion.tokens]
        row[: len(whole)] = whole
        where[len(s.prompt.ids) - 1 : len(whole) - 1] = True
    return ids, answer


@functools.partial(jax.jit, static_argnums=1)
def logp(params: dict, config: models.ModelConfig, ids: jax.Array) -> jax.Array:
    """[n, 15] log-probs of the next token, from full logits."""
    found = jax.nn.log_softmax(models.logits(params, config, ids)[:, :-1] / TEMPERATURE, axis=-1)
    return jnp.take_along_axis(found, ids[:, 1:, None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnums=1)
def entropy(params: dict, config: models.ModelConfig, ids: jax.Array) -> jax.Array:
    """[n, 15] −Σ p ln p over the vocabulary, from full logits."""
    found = jax.nn.log_softmax(models.logits(params, config, ids)[:, :-1] / TEMPERATURE, axis=-1)
    return -jnp.sum(jnp.exp(found) * found, axis=-1)


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.value_and_grad, has_aux=True)
def twin_loss(params: dict, config: models.ModelConfig, ids, answer, trained, old, ref, advantage):
    """GRPO (2402.03300): mean over sequences of the mean over tokens of −min(r A, clip(r) A) + β k3; and the ratios."""
    new, a = logp(params, config, ids), advantage[:, None]
    r, d = jnp.exp(new - old), ref - new
    each = -jnp.minimum(r * a, jnp.clip(r, 1 - CLIP, 1 + CLIP) * a) + BETA * (jnp.exp(d) - d - 1)
    means = jnp.sum(jnp.where(answer, each, 0.0), axis=1) / jnp.sum(answer, axis=1)
    return jnp.sum(jnp.where(trained, means, 0.0)) / jnp.sum(trained), r


def twin_adam(params: dict, grads: dict, moments: tuple, k: int) -> tuple[dict, tuple]:
    """Update number k = 0, 1, …: clip, AdamW with bias correction, a linear schedule over the run's 12 updates."""
    flat = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
    norm = np.sqrt(sum(np.sum(g * g) for g in flat))
    flat = [g * min(1.0, NORM / norm) for g in flat]
    leaves, tree = jax.tree.flatten(params)
    matrices = ["scale" not in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    rate, out, new = RATE * (1 - k / 12), [], []
    for p, g, (m, v), decays in zip(leaves, flat, moments, matrices):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
        step = m / (1 - B1 ** (k + 1)) / (np.sqrt(v / (1 - B2 ** (k + 1))) + EPS) + DECAY * decays * np.asarray(p, np.float64)
        out.append(jnp.asarray(np.asarray(p, np.float64) - rate * step, jnp.float32))
        new.append((m, v))
    return jax.tree.unflatten(tree, out), new


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    words = [w for w in grpo_words(tmp_path_factory.mktemp("update")) if not w.startswith(("model.overrides", "train.steps",
             "rollout.max_completion"))]  # fmt: skip
    return cfg.load("grpo", [*words, *WORDS])


def ours(config: cfg.GrpoConfig, groups: list[list[Sequence]], step: int = 2):
    """(start, reference, parameters after the step's four updates, metrics, batches, sequences, what the learner says of each
    token), as the loop makes them."""
    mesh = make_mesh(cfg.Mesh(), jax.devices()[:1])
    model = models.preset(config.model.preset, config.model.overrides)
    objective = objective_of(config)
    shapes = shapes_of(config, objective.loss, LONGEST, mesh)
    optimizer = opt.make(config.optimizer, 12, 0)
    state = states.create(model, optimizer, mesh, seed=1)
    reference = models.init(model, jax.random.key(5))
    start = jax.tree.map(np.asarray, state.params)
    score = grpo.compile_score(model, shapes, config.rollout.temperature, mesh)
    calls = []

    def counted(params, batch):
        calls.append(params)
        return score(params, batch)

    others, scored = {"ref_logp": ScoringModel(score, reference, False)}, minibatches_scored(config, objective.loss)
    batcher = Batcher(config, objective, shapes, mesh, PAD, counted, others, scored=scored)
    done, batches = batcher(groups, [], state.model_params, step)
    abstract = states.abstract(model, optimizer, mesh)
    inputs = types.SimpleNamespace(setup=types.SimpleNamespace(config=model), objective=objective)
    compiled = grpo.compile_step(config, inputs, shapes, optimizer, abstract, mesh, 12)
    def fetch(metrics, state, batch):
        return {k: float(v) for k, v in metrics.items() if k != "leaf_norms"}

    loop = types.SimpleNamespace(fetch=fetch)
    assert len(calls) == scored == 1  # of two minibatches: the first takes its own
    state, metrics, learner = grpo.update(compiled, state, batches, config.train.updates_per_rollout, loop, own=True)
    return model, start, reference, state.params, metrics, batches, done, learner


def test_a_step_of_four_updates_over_two_minibatches_equals_the_twin(settings):
    groups = sequences()
    model, start, reference, found, metrics, batches, done, learner = ours(settings, groups)
    flat = [s for group in groups for s in group]
    ids, answer = rows_of(flat)
    trained = np.array([not (np.isnan(s.reward) or s.completion.truncated) for s in flat])
    old, ref = logp(start, model, ids), logp(reference, model, ids)
    rewards = np.array([s.reward for s in flat]).reshape(4, 4)
    spread = np.nanstd(rewards, axis=1, ddof=1, keepdims=True) + 1e-4
    advantage = np.nan_to_num((rewards - np.nanmean(rewards, axis=1, keepdims=True)) / spread).reshape(-1)
    parts = np.array_split(order(0, 2, 16, 2), 2)
    params, moments, losses, clipped = start, [(0.0, 0.0)] * len(jax.tree.leaves(start)), [], 0
    for k in range(4):
        if k < 2:  # by token: log-probs of the rollout's policy, entropies of the one that the minibatch is first updated from
            for i, spread in zip(parts[k], entropy(params, model, ids[parts[k]])):
                said = of_learner(done[i], learner)
                np.testing.assert_allclose(said["entropy"], spread[answer[i]], atol=6e-4)
                np.testing.assert_allclose(said["gap"], old[i][answer[i]], rtol=6e-3)  # the sampler's are zeros
        given = (x[parts[k % 2]] for x in (ids, answer, trained, old, ref, advantage))
        (value, r), grads = twin_loss(params, model, *given)
        losses.append(float(value))
        clipped += int((np.abs(r - 1) > CLIP)[answer[parts[k % 2]] & trained[parts[k % 2]][:, None]].sum())
        params, moments = twin_adam(params, grads, moments, k)
    assert clipped > 0  # or clipping shows nothing
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), found, params)
    assert metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["learning_rate"] == pytest.approx(np.mean([RATE * (1 - k / 12) for k in range(4)]), rel=1e-6)
    tokens = [int(answer[part][trained[part]].sum()) for part in parts]
    assert metrics["tokens"] == np.mean(tokens)
    assert [int(b.loss_mask.sum()) for b in batches] == tokens


@pytest.mark.parametrize(
    ("words", "scored"),
    [
        (["train.updates_per_rollout=1"], 0),
        (["train.updates_per_rollout=3"], 0),
        (["train.updates_per_rollout=2", "train.minibatches=2"], 1),
        (["train.updates_per_rollout=8", "train.minibatches=4"], 3),
        (["train.updates_per_rollout=2", "train.minibatches=2", "loss.name=clip_cov"], 2),  # which tokens is a rule of all
        (["loss.name=luffy", "rollout.expert=true"], 1),
    ],
)
def test_the_policy_scores_what_is_not_trained_first(words, scored):
    config = cfg.load("grpo", ["kl.coef=0", *words])
    assert minibatches_scored(config, objective_of(config).loss) == scored


def test_a_correction_that_is_not_kept_teaches_nothing(settings):
    """The second turn's sequences are in the batch; those that are not kept are masked."""
    train = settings.train.model_copy(update={"minibatches": 1, "truncated": "train", "microbatch_size": 4})
    config = settings.model_copy(update={"second_turn": cfg.SecondTurn(samples=2, compare="first"), "train": train})
    groups = sequences()[:2]
    rng = np.random.default_rng(0)
    second = []
    for s in [s for group in groups for s in group]:
        made = [Completion(0, i, rng.integers(1, 384, 4).astype(np.int32), np.zeros(4), np.zeros(4), False, 0) for i in range(2)]
        second.append([Sequence(s.prompt, c, "", 9, {}, 1.0, kept=i == 0) for i, c in enumerate(made)])
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"prompts_per_step": 2}), "kl": cfg.Kl()})
    mesh = make_mesh(cfg.Mesh(), jax.devices()[:1])
    objective = objective_of(config)
    shapes = shapes_of(config, objective.loss, LONGEST, mesh)
    assert shapes.rows == 2 * 4 * 3
    score = types.SimpleNamespace(logp=jnp.zeros((24, shapes.row_length)), entropy=None)
    batcher = Batcher(config, objective, shapes, mesh, PAD, lambda params, batch: score, {})
    done, (batch,) = batcher(groups, second, {}, 1)
    firsts = sum(len(s.completion.tokens) for group in groups for s in group)
    assert float(batch.loss_mask.sum()) == firsts + 8 * 4
    assert {s.kept for s in done[8:]} == {True, False}
    for s, first in zip(done[8::2], [s for group in groups for s in group]):
        assert s.advantage == pytest.approx(1.0 - first.reward)


def test_kl_in_the_reward_and_a_teacher_reach_corrections_compared_with_the_first_answer(settings):
    """A = (R − β k) − (R₁ − β k₁) + c (log π_teacher − log π), whomever a correction is compared with."""
    from jaxreason.rl.advantages import advantages_of

    def one(reward, logp, ref, teacher):
        drawn = Completion(0, 0, np.zeros(1, np.int32), np.array([logp]), np.array([logp]), False, 0)
        made = Sequence(Prompt((1,), "", "", "", 0), drawn, "", 0, {}, reward)
        return dataclasses.replace(made, ref_logp=np.array([ref]), teacher_logp=np.array([teacher]))

    first, again = one(1.0, -1.0, -1.5, -1.0), one(2.0, -1.0, -3.0, -0.5)
    words = {"second_turn": cfg.SecondTurn(samples=1, compare="first"), "teacher": cfg.Teacher(weights="t", coef=4.0)}
    for estimator, k, k1 in (("k1", 2.0, 0.5), ("k2", 2.0, 0.125), ("k3", np.exp(-2.0) + 1.0, np.exp(-0.5) - 0.5)):
        kl = cfg.Kl(coef=0.1, placement="reward", estimator=estimator)
        config = settings.model_copy(update={**words, "kl": kl})
        _, second = advantages_of([[first]], [[again]], objective_of(config), config)
        np.testing.assert_allclose(second[0][0].advantage, [(2.0 - 0.1 * k) - (1.0 - 0.1 * k1) + 4.0 * 0.5], rtol=1e-6)


def test_an_adaptive_coefficient_reaches_the_loss_or_the_advantages(settings):
    """The batch's field, or R - beta k with k = log pi - log pi_ref = 1 at every token."""
    for placement in ("loss", "reward"):
        kl = cfg.Kl(coef=0.1, target=1.0, placement=placement)
        config = settings.model_copy(update={"kl": kl, "advantage": cfg.Advantage(name="raw")})
        mesh, objective = make_mesh(cfg.Mesh(), jax.devices()[:1]), objective_of(config)
        shapes = shapes_of(config, objective.loss, LONGEST, mesh)
        rows = (shapes.rows, shapes.row_length)
        policy, reference = (types.SimpleNamespace(logp=jnp.full(rows, x), entropy=None) for x in (0.0, -1.0))
        model = types.SimpleNamespace(params=lambda: {}, score=lambda params, batch, reference=reference: reference)
        batcher = Batcher(config, objective, shapes, mesh, PAD, lambda params, batch, policy=policy: policy, {"ref_logp": model})
        done, batches = batcher(sequences(), [], {}, 2, {"kl_coef": 0.4})
        assert ("kl_coef" in shapes.fields) == (placement == "loss") == (batches[0].kl_coef is not None)
        s = done[0]
        if placement == "loss":
            assert np.unique(batches[0].kl_coef).tolist() == [np.float32(0.4)] and s.advantage == pytest.approx(s.reward)
        else:
            assert s.advantage == pytest.approx(s.reward - 0.4 * len(s.completion.tokens))


def test_minibatches_mix_groups_anew_in_every_step_and_one_takes_them_as_drawn():
    assert order(0, 2, 16, 1).tolist() == list(range(16))
    first, second = order(0, 2, 16, 2), order(0, 3, 16, 2)
    assert sorted(first) == sorted(second) == list(range(16)) and order(0, 2, 16, 2).tolist() == first.tolist()
    assert first.tolist() != list(range(16)) and first.tolist() != second.tolist()
    assert len({i // 4 for i in first[:8]}) > 2  # half of the sequences, of more than half of the groups


def test_the_shares_of_right_answers_and_the_mean_of_the_correction_are_of_each_update(settings):
    """A loss reads ``positive`` (VAPO) and a normalized correction in a batch that is one of two minibatches."""
    loss = cfg.GrpoLoss(options={"positive_nll_coef": 0.1, "correction": "tis", "correction_normalize": "step"})
    config = settings.model_copy(update={"loss": loss, "kl": cfg.Kl()})
    mesh = make_mesh(cfg.Mesh(), jax.devices()[:1])
    objective = objective_of(config)
    shapes = shapes_of(config, objective.loss, LONGEST, mesh)
    assert objective.loss.needs == {"positive", "sampler_logp", "selected"} and "old_logp" in shapes.fields
    score = types.SimpleNamespace(logp=jnp.full((shapes.rows, shapes.row_length), -1.0), entropy=None)
    batcher = Batcher(config, objective, shapes, mesh, PAD, lambda params, batch: score, {})
    rng = np.random.default_rng(4)

    def changed(s: Sequence) -> Sequence:
        drawn = dataclasses.replace(s.completion, behaviour_logp=-2 * rng.random(len(s.completion.tokens)))
        return dataclasses.replace(s, completion=drawn, reward=s.reward - 0.5)

    done, batches = batcher([[changed(s) for s in group] for group in sequences()], [], {}, 2)
    for batch, part in zip(batches, np.array_split(order(0, 2, 16, 2), 2)):
        flat = [done[i] for i in part]
        live = [s for s in flat if not (np.isnan(s.reward) or s.completion.truncated)]
        tokens = sum(len(s.completion.tokens) for s in live)
        right = sum(len(s.completion.tokens) for s in live if s.reward > 0)
        assert 0 < right < tokens == int(batch.loss_mask.sum())
        found = np.asarray(batch.extras["positive"])
        np.testing.assert_allclose(found[found > 0], tokens / right, rtol=1e-6)
        assert (found > 0).sum() == right and not found[np.asarray(batch.loss_mask) == 0].any()
        rho = np.minimum(np.exp(-1.0 - np.concatenate([s.completion.behaviour_logp for s in live])), 2.0)
        picked = np.asarray(batch.selected)[np.asarray(batch.loss_mask) > 0]
        np.testing.assert_allclose(picked, 1 / rho.mean(), rtol=1e-5)


def test_a_rule_of_the_current_policy_is_evaluated_before_every_update(settings):
    """REAL: at the rollout's policy every exponential is 1, so that three right completions share 1 / 4."""
    train = settings.train.model_copy(update={"minibatches": 1, "truncated": "train"})
    config = settings.model_copy(update={"loss": cfg.GrpoLoss(name="real"), "kl": cfg.Kl(), "train": train})
    mesh, objective = make_mesh(cfg.Mesh(), jax.devices()[:1]), objective_of(config)
    shapes = shapes_of(config, objective.loss, LONGEST, mesh)

    def score(params, batch):  # 0.5 / token more than at params 0
        return types.SimpleNamespace(logp=jnp.full((shapes.rows, shapes.row_length), -1.0 + 0.5 * params), entropy=None)

    batcher = Batcher(config, objective, shapes, mesh, PAD, score, {})
    rewards = [[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4]
    groups = [[dataclasses.replace(s, reward=r) for s, r in zip(*row)] for row in zip(sequences(), rewards)]
    _, (batch,) = batcher(groups, [], 0, 2)

    def found(batch):  # of each sequence, the first of its tokens
        first = [np.flatnonzero(np.asarray(batch.sequence_ids == i)[np.asarray(batch.loss_mask) > 0])[0] for i in range(1, 17)]
        return np.asarray(batch.selected)[np.asarray(batch.loss_mask) > 0][first].reshape(4, 4)

    scale = 16 / 4
    np.testing.assert_allclose(found(batch)[:2] / scale, [[1 / 4] * 3 + [1 / 2], [1 / 2] + [1 / 4] * 3], rtol=1e-6)
    assert not found(batch)[2:].any()
    up, down = np.exp(-0.5 / 0.5), np.exp(0.5 / 0.5)
    moved = [[1 / (1 + 3 * up)] * 3 + [1 / (1 + down)], [1 / (1 + up)] + [1 / (1 + 3 * down)] * 3]
    np.testing.assert_allclose(found(batcher.reselected(2, batch, 1))[:2] / scale, moved, rtol=1e-5)

    seen, states = [], [types.SimpleNamespace(model_params=k) for k in range(4)]
    step = lambda state, batch, second: (states[state.model_params + 1], {"x": batch.x}, {})  # noqa: E731
    fetch = types.SimpleNamespace(fetch=lambda metrics, state, batch: seen.append(metrics["x"]) or {})
    batches = [types.SimpleNamespace(x=x, old_logp=None) for x in "ab"]
    picked = lambda batch, params: types.SimpleNamespace(x=f"{batch.x}{params}", old_logp=None)  # noqa: E731
    grpo.update(step, states[0], batches, 3, fetch, picked)
    assert seen == ["a", "b1", "a2"]
    with pytest.raises(UserError, match=r"set train\.minibatches=1"):
        objective_of(config.model_copy(update={"train": settings.train}))


def test_sums_of_squared_probabilities_reach_the_estimator(settings):
    """Of packed rows in microbatches, against the softmax of full logits of one sequence at a time."""
    config = settings.model_copy(update={"advantage": cfg.Advantage(name="otb"), "kl": cfg.Kl()})
    mesh, objective = make_mesh(cfg.Mesh(), jax.devices()[:1]), objective_of(config)
    model = models.preset(config.model.preset, config.model.overrides)
    shapes, params = shapes_of(config, objective.loss, LONGEST, mesh), models.init(model, jax.random.key(3))
    assert objective.squares and not objective_of(settings).squares
    score = types.SimpleNamespace(logp=jnp.zeros((shapes.rows, shapes.row_length)), entropy=None)
    squares = grpo.compile_squares(model, shapes, TEMPERATURE, mesh)
    batcher = Batcher(config, objective, shapes, mesh, PAD, lambda params, batch: score, {}, squares=squares)
    done, _ = batcher(sequences(), [], params, 2)
    ids, answer = rows_of(done)
    pi = jax.nn.softmax(jax.jit(models.logits, static_argnums=1)(params, model, ids)[:, :-1] / TEMPERATURE)
    for s, expected, where in zip(done, np.square(pi).sum(-1), answer):
        np.testing.assert_allclose(s.extras["sum_pi_squared"], expected[where], rtol=1e-4)
    assert any(np.ptp(s.advantage) > 0 for s in done)  # not one number for all tokens
