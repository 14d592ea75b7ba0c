"""On-policy distillation: what the teacher reads, the divergence in the step against full logits, and whole runs.

The twin packs nothing and shares no code with the step apart from the network's ``logits``.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import grpo_words, sft_words
from test_step import CONFIG

from jaxreason import cli, losses, model
from jaxreason import config as cfg
from jaxreason.data import chat as chats
from jaxreason.data.prompts import Prompt
from jaxreason.data.tokenizer import load
from jaxreason.errors import UserError
from jaxreason.rl import grpo
from jaxreason.rl.batch import Packed
from jaxreason.rl.context import CONTEXTS, TeacherPrompts
from jaxreason.rl.sequence import Sequence
from jaxreason.rl.shapes import shapes_of
from jaxreason.sampler import Completion
from jaxreason.sharding import batch_sharding, make_mesh, replicated, shardings
from jaxreason.train.step import ITSELF, batch_loss, make_gradient, totals_of

PARAMS = model.init(CONFIG, jax.random.key(1))
OTHER = CONFIG.replace(embed_dim=16, num_heads=2, num_layers=1)
TEACHER = model.init(OTHER, jax.random.key(7))
MODELS = {"other": (OTHER, TEACHER), "itself": (ITSELF, None), "a copy": (CONFIG, PARAMS)}


def sequences(told: bool) -> list[Sequence]:
    """Six of unequal lengths; with ``told`` the teacher reads longer prompts, and of one sequence nothing."""
    rng, found = np.random.default_rng(5), []
    for i, (p, n) in enumerate([(3, 5), (1, 9), (4, 2), (2, 7), (6, 1), (2, 4)]):
        ids = tuple(rng.integers(1, 64, p).tolist())
        tokens = rng.integers(1, 64, n).astype(np.int32)
        theirs = (() if i == 3 else (*rng.integers(1, 64, i + 1).tolist(), *ids)) if told else None
        done = Completion(i, 0, tokens, np.zeros(n), np.zeros(n), False, 0)
        found.append(Sequence(Prompt(ids, "", "", "", i), done, "", i, {}, 1.0, teacher_ids=theirs))
    return found


def batch_of(items: list[Sequence], length: int, rows: int, count: int):
    packed = Packed.of(items, length, rows, count)
    view = packed.teacher_view(0) if items[0].teacher_ids is not None else None
    batch = dataclasses.replace(packed.batch(0, False), teacher=view, advantages=packed.field(lambda s: s.group - 2.5))
    return jax.tree.map(jnp.asarray, batch)


def rows_of(items, prompts):
    """ids [n, 24], one sequence a row and nothing else, and the columns [n, 9] that predict its completion."""
    ids, columns = np.zeros((len(items), 24), np.int32), np.zeros((len(items), 9), np.int32)
    for row, at, s, prompt in zip(ids, columns, items, prompts):
        row[: len(prompt) + len(s.tokens)] = [*prompt, *s.tokens]
        at[: len(s.tokens)] = len(prompt) - 1 + np.arange(len(s.tokens))
    return jnp.asarray(ids), jnp.asarray(columns)


def twin(items, which, name, options):
    """(value, gradient) of the mean over tokens of D(student, teacher) by full logits, one sequence a row."""
    config, theirs = MODELS["a copy" if which == "itself" else which]
    mine = rows_of(items, [s.prompt.ids for s in items])
    seen = rows_of(items, [s.teacher_ids or s.prompt.ids for s in items])
    live = np.array([[t < len(s.tokens) and s.teacher_ids != () for t in range(9)] for s in items])

    def log_probs(params, shape, rows):
        logits = jnp.take_along_axis(model.logits(params, shape, rows[0]), rows[1][..., None], axis=1)
        return jax.nn.log_softmax(logits / options.get("temperature", 1.0))

    def total(params):
        q, p = log_probs(params, CONFIG, mine), log_probs(theirs, config, seen)
        each = jnp.exp(q) * (q - p) if name == "reverse_kl" else jnp.exp(p) * (p - q)
        return jnp.sum(jnp.where(live, each.sum(-1), 0.0)) / sum(len(s.tokens) for s in items)

    return jax.jit(jax.value_and_grad(total))(PARAMS)


def measured(batch, which, divergence, count=1, mesh=None, loss=None, **options):
    """(value, metrics, gradient) of the step's loss, at the rollout's temperature 0.7."""
    second, theirs = MODELS[which]
    loss = dataclasses.replace(loss or losses.get("distill"), divergence=losses.divergence(divergence, **options))
    function = make_gradient(CONFIG, loss, count, 0.7, second)
    if mesh is None:
        return jax.jit(function)(PARAMS, batch, theirs)[:3]
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings(PARAMS, mesh))
        theirs = theirs and jax.device_put(theirs, shardings(theirs, mesh))
        placed = jax.device_put(batch, batch_sharding(mesh))
        return jax.jit(function, out_shardings=replicated(mesh))(params, placed, theirs)[:3]


def close(a, b, tolerance=2e-6):
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5, atol=tolerance)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=tolerance), a[-1], b[-1])


@pytest.mark.parametrize(
    ("which", "divergence", "told", "options"),
    [("other", "reverse_kl", False, {}), ("other", "forward_kl", True, {"temperature": 2.0}), ("itself", "reverse_kl", True, {})],
)
def test_the_step_equals_full_logits_however_it_is_packed_and_split(which, divergence, told, options):
    """The rollout's temperature is not the divergence's; the teacher's prompts are others than the policy's, or the same."""
    items = sequences(told)
    wanted = twin(items, which, divergence, options)
    assert wanted[0] > 1e-3
    whole = measured(batch_of(items, 16, 6, 1), which, divergence, **options)
    close(whole, wanted)
    np.testing.assert_allclose(whole[1]["teacher_divergence"], wanted[0], rtol=1e-5)
    close(measured(batch_of(items, 40, 6, 3), which, divergence, 3, **options), wanted)
    if which == "other" and told:
        mesh = make_mesh(cfg.Mesh(data=2, fsdp=2, tensor=2))
        close(measured(batch_of([*items], 40, 8, 2), which, divergence, 2, mesh=mesh, **options), wanted)


def test_the_policy_as_its_own_teacher_is_a_copy_of_it_without_a_gradient():
    items = sequences(True)
    batch = batch_of(items, 16, 6, 2)
    found = measured(batch, "itself", "jsd", 2)
    close(found, measured(batch, "a copy", "jsd", 2))
    loss = dataclasses.replace(losses.get("distill"), divergence=losses.divergence("jsd"))
    direct = jax.jit(
        jax.value_and_grad(lambda p: batch_loss(p, CONFIG, loss, batch, totals_of(batch), 0.7, (CONFIG, p))[0])
    )(PARAMS)
    close(found, direct)  # what is differentiated are the policy's parameters, not the teacher's
    same = batch_of(sequences(False), 16, 6, 1)
    value, _, gradient = measured(same, "itself", "forward_kl")
    assert abs(value) < 1e-6 and all(np.all(np.abs(g) < 1e-6) for g in jax.tree.leaves(gradient))


def test_a_task_reward_and_a_teacher_add():
    """grpo + 0.3 D: the gradient is that of grpo and 0.3 times that of the divergence over the same denominators."""
    batch = batch_of(sequences(True), 16, 6, 1)
    both = measured(batch, "other", "reverse_kl", loss=losses.get("bnpo", distill_coef=0.3))
    reward = jax.jit(make_gradient(CONFIG, losses.get("bnpo"), 1, 0.7))(PARAMS, batch)[:3]
    alone = measured(batch, "other", "reverse_kl")
    close(both, (reward[0] + 0.3 * alone[0], jax.tree.map(lambda a, b: a + 0.3 * b, reward[2], alone[2])))
    assert both[1]["entropy"] > 0 and set(reward[1]) <= set(both[1])


def test_what_the_teacher_reads_by_hand():
    """Prompts 7 8 and 9; the teacher's are 5 5 7 8 and nothing: positions that predict 1 2 3 are 3, 4, 5 and not 1, 2, 3."""
    done = [Completion(0, 0, np.array(t, np.int32), np.zeros(len(t)), np.zeros(len(t)), False, 0) for t in ([1, 2, 3], [4])]
    items = [
        Sequence(Prompt((7, 8), "", "", "", 0), done[0], "", 0, {}, 1.0, teacher_ids=(5, 5, 7, 8)),
        Sequence(Prompt((9,), "", "", "", 1), done[1], "", 1, {}, 1.0, teacher_ids=()),
    ]
    packed = Packed.of(items, 8, 2, 1)
    view, batch = packed.teacher_view(0), packed.batch(0, False)
    assert view.tokens[0].tolist() == [5, 5, 7, 8, 1, 2, 9, 0] and view.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert batch.tokens[0].tolist() == [7, 8, 1, 2, 0, 0, 9, 0] and batch.segment_ids[0].tolist() == [1, 1, 1, 1, 0, 0, 2, 0]
    assert view.segment_ids[0].tolist() == [1, 1, 1, 1, 1, 1, 2, 0]
    assert view.source[0].tolist() == [0, 3, 4, 5, 4, 5, 6, 7]
    assert view.taught[0].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]


# --- what the teacher is told


@pytest.fixture(scope="module")
def told():
    tokenizer = load("embedded")
    settings = cfg.Teacher(weights="self", divergence="reverse_kl", context="peer", prompt="{question} ({context})")
    return TeacherPrompts(settings, CONTEXTS["peer"], chats.resolve(tokenizer), tokenizer, 40)


def sampled(tokenizer, texts_and_rewards):
    prompt = Prompt((1, 2), "", "12", "7 + 5", 0, reply="<think>\nadd\n</think>\n\n12")
    return [
        Sequence(prompt, Completion(0, i, np.ones(3, int), np.zeros(3), np.zeros(3), False, 0), text, 0, {"right": r}, r)
        for i, (text, r) in enumerate(texts_and_rewards)
    ]


def test_contexts(told):
    group = sampled(told.tokenizer, [("wrong", 0.0), ("12", 1.0), ("twelve", 1.0), ("?", math.nan)])
    assert [CONTEXTS["answer"](s, group) for s in group] == ["12"] * 4
    assert CONTEXTS["solution"](group[0], group) == "<think>\nadd\n</think>\n\n12"
    assert [CONTEXTS["peer"](s, group) for s in group] == ["12", "twelve", "12", "12"]
    assert CONTEXTS["peer"](group[1], group[:2]) is None  # its own answer is no other's


def test_a_teachers_prompt_holds_the_question_and_what_it_is_told(told):
    group = sampled(told.tokenizer, [("wrong", 0.0), ("{question} <|eot_id|>12", 1.0)])
    first, second = told([group])[0]
    text = told.tokenizer.decode(list(first.teacher_ids))
    assert "7 + 5 ({question} 12)" in text and second.teacher_ids == ()
    short = dataclasses.replace(told, max_more=3)
    assert short([group])[0][0].teacher_ids == ()  # too long a prompt is none


def test_a_context_of_ones_own_that_fails_is_named(told):
    def broken(sequence, group):
        return 1 / 0

    with pytest.raises(UserError, match=r"teacher\.context peer: ZeroDivisionError"):
        dataclasses.replace(told, context=broken)([sampled(told.tokenizer, [("a", 1.0)])])
    with pytest.raises(UserError, match="returned a int"):
        dataclasses.replace(told, context=lambda s, group: 3)([sampled(told.tokenizer, [("a", 1.0)])])


# --- runs


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    root = tmp_path_factory.mktemp("teacher")
    assert cli.train(["--config", "sft", "model.preset=embedded-tiny", *sft_words(root)]) == 0
    return root / "sft"


DISTILL = ["loss.name=distill", "teacher.divergence=reverse_kl", "rollout.group_size=2", "model.compute_dtype=float32"]


@pytest.mark.parametrize("divergence", ["reverse_kl", "null"])
def test_a_teacher_that_is_the_reference_is_one_model_with_it(divergence, tmp_path):
    """And is refreshed with it; without a reference, it is a model of its own."""
    for coef in (0.1, 0.0):
        words = [f"teacher.divergence={divergence}", "teacher.weights=start", f"kl.coef={coef}"]
        config = cfg.load("grpo", grpo_words(tmp_path, *words))
        inputs, mesh = grpo.open_inputs(config), make_mesh(cfg.Mesh(), jax.devices()[:1])
        shapes = shapes_of(config, inputs.objective.loss, inputs.longest_prompt, mesh)
        others = grpo.scoring_models(config, inputs, None, shapes, mesh)
        distilled = grpo.distilled_from(config, inputs, mesh, others)
        teacher = distilled if divergence != "null" else others["teacher_logp"]
        assert (teacher is others.get("ref_logp")) == (coef > 0) and (distilled is None) == (divergence == "null")
        assert ("ref_logp" in others, "teacher_logp" in others) == (coef > 0, divergence == "null")


def test_distilling_moves_the_policy_to_the_teacher(teacher, tmp_path):
    words = [*DISTILL, f"teacher.weights={teacher}", "train.steps=12", "optimizer.learning_rate=3e-3", "teacher.offload=true"]
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, *words)]) == 0
    found = [line["teacher_divergence"] for line in lines_of(tmp_path / "grpo")]
    assert found[-1] < 0.8 * found[0]
    still = [*words[:-3], "train.steps=2"]
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, "run.name=still", *still, "teacher.coef=3")]) == 0
    first = lines_of(tmp_path / "still")[0]
    np.testing.assert_allclose(first["teacher_divergence"], found[0], rtol=1e-5)  # the same samples, the teacher on the devices
    np.testing.assert_allclose(first["loss"], 3 * found[0], rtol=1e-5)


def test_the_starting_weights_told_the_answer_teach_and_their_own_answers_are_mixed_in(teacher, tmp_path):
    words = [
        *DISTILL, f"model.weights={teacher}", "model.preset=null", "model.overrides={}", "teacher.weights=start",
        "teacher.context=answer", "teacher.data_fraction=0.5", "train.steps=2", "rollout.max_completion_tokens=64",
    ]  # fmt: skip
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, *words)]) == 0
    lines = lines_of(tmp_path / "grpo")
    assert all(line["teacher_divergence"] > 1e-4 and line["sampler_gap_max"] < 1e-4 for line in lines)
    samples = [json.loads(line) for line in (tmp_path / "grpo" / "samples.jsonl").read_text().splitlines()]
    given = [s for s in samples if s["reward"] is None]
    assert len(samples) == 2 * (2 * 2 + 2) and len(given) == 4  # of four prompts two, once each
    assert all(s["completion"].startswith("<think>") and not s["truncated"] for s in given)
    drawn = [s["tokens"] for s in samples if s["step"] == 1 and s["reward"] is not None]
    assert lines[0]["completion_tokens"] == pytest.approx(np.mean(drawn))
    assert lines[0]["tokens"] == sum(s["tokens"] for s in samples if s["step"] == 1)


def test_the_policy_told_the_answer_teaches_itself_and_resumes(teacher, tmp_path):
    words = [
        *DISTILL, f"model.weights={teacher}", "model.preset=null", "model.overrides={}", "teacher.weights=self",
        "teacher.context=solution", "rollout.max_completion_tokens=64", "train.updates_per_rollout=2", "train.save_every=2",
    ]  # fmt: skip
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, *words, "train.steps=2")]) == 0
    lines = lines_of(tmp_path / "grpo")
    assert all(line["teacher_divergence"] > 1e-5 for line in lines)
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, *words, "train.steps=2")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.divergence=reverse_kl"], "set teacher.weights"),
        (["teacher.weights=self", "teacher.divergence=jsd"], "without teacher.context is the policy itself"),
        (["teacher.weights=start", "teacher.context=answer"], "set teacher.divergence"),
        (["teacher.weights=start", "teacher.divergence=jsd", "teacher.options={betta: 1}"], "did you mean beta"),
        (["teacher.weights=start", "teacher.divergence=jsd", "teacher.context=anser"], "did you mean answer"),
        (["teacher.weights=start", "teacher.divergence=jsd", "teacher.context=answer", "teacher.prompt=hello"],
         "teacher.prompt lacks {question}"),
        (["teacher.weights=start", "teacher.divergence=jsd", "teacher.data_fraction=0.5", "second_turn.samples=2"],
         "does not combine"),
        (["teacher.weights=start", "teacher.divergence=jsd", "kl.coef=0.1", "teacher.offload=true"], "give both one value"),
        (["loss.name=distill", "teacher.weights=start", "teacher.divergence=jsd", "teacher.data_fraction=0.1"],
         "of 4 prompts of a process and step it is 0"),
        (["loss.name=distill"], "set teacher.weights and teacher.divergence"),
        (["loss.options={distill_coef: 1}"], "set teacher.coef instead"),
        (["teacher.weights=start", "teacher.divergence=jsd", "teacher.context=graders.py:raises"], "teacher.max_context_tokens"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_said(words, message, tmp_path, capsys):
    assert cli.train(["--config", "grpo", *grpo_words(tmp_path, *words)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
