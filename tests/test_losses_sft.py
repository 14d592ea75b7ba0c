"""Supervised losses: hand numbers, double-loop twins with finite differences, poison, split, chunks of tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import losses_cases as cases
import losses_twin as twin
import numpy as np
import pytest

from jaxreason import losses
from jaxreason.errors import UserError
from jaxreason.losses import distill, sft
from jaxreason.losses.segments import sequences_of

exp, log = math.exp, math.log


def power(a, b):
    return lambda s, t: -(exp(s.logp0[t]) ** a) * (1 - exp(s.logp0[t])) ** b * s.logp[t]


def iw_sequence(s, t):
    gap = sum(s.logp0[k] - s.ref_logp[k] for k in range(s.n)) / s.n
    return -min(exp(2 * gap), 1.1) * s.logp[t]


CASES = [
    ("nll", {}, lambda s, t: -s.logp[t], "token-mean"),
    ("nll", {"reduce": "seq-mean-token-mean"}, lambda s, t: -s.logp[t], "seq-mean-token-mean"),
    ("nll", {"reduce": "seq-sqrt"}, lambda s, t: -s.logp[t], "seq-sqrt"),
    ("power", {"a": 0.5, "b": 1.5}, power(0.5, 1.5), "token-mean"),
    ("dft", {}, power(1, 0), "token-mean"),
    ("focal", {}, power(0, 2), "token-mean"),
    ("chord_phi", {}, power(1, 1), "token-mean"),
    ("label_smoothing", {}, lambda s, t: -0.9 * s.logp[t] - 0.1 * s.mean_logp[t], "token-mean"),
    ("z_loss", {}, lambda s, t: -s.logp[t] + 1e-4 * s.logsumexp[t] ** 2, "token-mean"),
    ("asft", {}, lambda s, t: power(1, 0)(s, t) + 0.05 * s.ref_kl[t], "token-mean"),
    ("sft_kl", {}, lambda s, t: -s.logp[t] + 0.05 * s.ref_kl[t], "token-mean"),
    ("iw_sft", {"tau": 2.0, "weight_max": 1.1}, iw_sequence, "token-mean"),
    ("iw_sft", {"level": "token"},
     lambda s, t: -twin.clip(exp(s.logp0[t] - s.ref_logp[t]), 0.2, 1.8) * s.logp[t], "token-mean"),
    ("eaft", {"alpha": 1.5}, lambda s, t: -((s.topk_entropy[t] / 3) ** 1.5) * s.logp[t], "token-mean"),
    ("rho1", {}, lambda s, t: -s.logp[t] * (s.ref_logp[t] > s.logp0[t]), "token-mean"),
    ("psft", {"clip_high": 0.2}, lambda s, t: -min(exp(s.logp[t] - s.ref_logp[t]), 1.2), "token-mean"),
    ("forward_kl", {"nll_coef": 0.3}, lambda s, t: s.teacher_divergence[t] - 0.3 * s.logp[t], "token-mean"),
    ("reverse_kl", {"nll_coef": 0.5, "reduce": "seq-mean-token-mean"},
     lambda s, t: s.teacher_divergence[t] - 0.5 * s.logp[t], "seq-mean-token-mean"),
    ("skew_forward_kl", {"alpha": 0.2}, lambda s, t: s.teacher_divergence[t], "token-mean"),
    ("skew_reverse_kl", {"top_k": 5}, lambda s, t: s.teacher_divergence[t], "token-mean"),
    ("adaptive_kl", {"nll_coef": 0.2}, lambda s, t: s.teacher_divergence[t] - 0.2 * s.logp[t], "token-mean"),
    ("jsd", {"nll_coef": 1.0}, lambda s, t: s.teacher_divergence[t] - s.logp[t], "token-mean"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "token_loss", "reduce"), CASES, ids=[f"{c[0]}-{k}" for k, c in enumerate(CASES)]
)
def test_twin(name, options, token_loss, reduce):
    loss = losses.get(name, **options)
    data = twin.arrays()
    inputs = cases.make("sft", data, keys=set(data))
    value, grad = cases.check_rules(loss, inputs)

    def slow(data, frozen):
        return twin.aggregate(reduce, lambda s, t: s.token_weights[t] * token_loss(s, t), data, frozen)

    np.testing.assert_allclose(value, slow(data, data), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, twin.finite_difference(slow, data, "logp"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "field"),
    [("asft", "ref_kl"), ("sft_kl", "ref_kl"), ("label_smoothing", "mean_logp"), ("z_loss", "logsumexp"),
     ("forward_kl", "teacher_divergence"), ("reverse_kl", "teacher_divergence"), ("jsd", "teacher_divergence")],
)  # fmt: skip
def test_gradient_by_what_else_it_differentiates(name, field):
    """The model's gradient also comes through these inputs: finite differences, with NaN at every masked position."""
    _, options, token_loss, reduce = next(case for case in CASES if case[0] == name)
    loss, data = losses.get(name, **options), twin.arrays()
    inputs = cases.poisoned(losses.reduce.whole_step(cases.make("sft", data, keys=set(data))), float("nan"))
    grad = jax.grad(lambda values: loss(dataclasses.replace(inputs, **{field: values}))[0])(getattr(inputs, field))

    def slow(data, frozen):
        return twin.aggregate(reduce, lambda s, t: s.token_weights[t] * token_loss(s, t), data, frozen)

    np.testing.assert_allclose(grad, twin.finite_difference(slow, data, field), rtol=1e-4, atol=1e-6)


# Three tokens with p = .5, .25, .25 in sequences of one and two.
HAND = {
    "nll": 5 * log(2) / 3,
    "power": 5 * log(2) / 3,
    "dft": (0.5 + 0.5 + 0.5) * log(2) / 3,
    "focal": (0.25 * 1 + 2 * 0.5625 * 2) * log(2) / 3,
    "chord_phi": (0.25 * 1 + 2 * 0.1875 * 2) * log(2) / 3,
    "label_smoothing": 0.9 * 5 * log(2) / 3 + 0.1 * 3.0,  # mean log p_v = -3
    "z_loss": 5 * log(2) / 3 + 1e-4 * 4,  # logsumexp 2
    "asft": 0.5 * log(2) + 0.05 * 0.2,  # KL .2
    "sft_kl": 5 * log(2) / 3 + 0.05 * 0.2,
    "iw_sft": (2 * 1 + 1 * 4) * log(2) / 3,  # p_ref .25: weights 2 and 1
    "eaft": 5 * log(2) / 3 * 0.5,  # H = 1.5
    "rho1": 0.0,  # p_ref is nowhere above p
    "psft": -(1.28 + 1 + 1) / 3,  # w = 2, 1, 1
    "forward_kl": 0.4,
    "reverse_kl": 0.4,
    "jsd": 0.4,
    "skew_forward_kl": 0.4,
    "skew_reverse_kl": 0.4,
    "adaptive_kl": 0.4,
}


@pytest.mark.parametrize("name", HAND)
def test_hand_number(name):
    def full(x):
        return jnp.full((4, 7), x, jnp.float32)

    # In a [4, 7] batch, so that nothing new is compiled.
    inputs = losses.SftInputs(
        logp=full(log(0.25)).at[0, 0].set(log(0.5)),
        mask=full(0.0).at[0, 0].set(1.0).at[1, :2].set(1.0),
        ref_kl=full(0.2),
        logsumexp=full(2.0),
        mean_logp=full(-3.0),
        ref_logp=full(log(0.25)),
        topk_entropy=full(1.5),
        teacher_divergence=full(0.4),
        entropy=full(0.7),
        sequence_ids=jnp.asarray(np.repeat(np.arange(4)[:, None], 7, axis=1), jnp.int32),
    )
    value, metrics, _ = cases.evaluate_one(losses.get(name), inputs)
    np.testing.assert_allclose(value, HAND[name], rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], 5 * log(2) / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], 0.7, rtol=1e-5)


def test_all_are_covered():
    assert set(HAND) == set(losses.names("sft")) == {c[0] for c in CASES}


def test_tokenwise_losses_allow_chunks_of_tokens():
    data = twin.arrays()
    for name in losses.names("sft"):
        loss = losses.get(name)
        assert loss.tokenwise == (name != "iw_sft")
        if not loss.tokenwise:
            continue
        inputs = losses.reduce.whole_step(cases.make("sft", data, keys=loss.needs))
        flat = jax.tree.map(lambda x: x.reshape(1, -1) if jnp.ndim(x) else x, inputs)
        chunks = [jax.tree.map(lambda x, k=k: x[:, k : k + 7] if jnp.ndim(x) else x, flat) for k in range(0, 28, 7)]
        parts = cases.evaluate(loss, chunks)[0][: len(chunks)]
        np.testing.assert_allclose(parts.sum(), cases.evaluate_one(loss, inputs)[0], rtol=1e-6)
    assert not losses.get("nll", reduce="seq-mean-token-mean").tokenwise
    assert losses.get("iw_sft", level="token").tokenwise


def test_dft_gradient_is_that_of_minus_p():
    """grad of -sg[p] log p by the logits equals grad of -p, which vanishes as p -> 0."""
    logits = jnp.asarray([1.0, -2.0, 0.5, 3.0])

    def dft(z):
        inputs = losses.SftInputs(logp=jax.nn.log_softmax(z)[1].reshape(1, 1), mask=jnp.ones((1, 1)))
        return losses.get("dft")(inputs)[0]

    np.testing.assert_allclose(
        jax.jit(jax.grad(dft))(logits), jax.grad(lambda z: -jax.nn.softmax(z)[1])(logits), atol=1e-7
    )


def test_certain_token_has_finite_focal_gradient():
    inputs = losses.SftInputs(logp=jnp.zeros((1, 1)), mask=jnp.ones((1, 1)))
    for b in (0.5, 2.0):
        _, _, grad = cases.evaluate_one(losses.get("power", b=b), inputs)
        assert grad[0, 0] == 0


def test_neftune_scale():
    """alpha / sqrt(L D) of each sequence's own length: 5/12 for 16 tokens of width 9, 5/18 for 36, 5/24 for 64."""
    ids = jnp.asarray([[1] * 16 + [2] * 36 + [0] * 12, [1] * 64])
    keys = jax.random.split(jax.random.key(0), 2)
    noise = np.abs(sft.neftune_noise(keys, sequences_of(ids > 0, ids), 9, 5.0))
    for part, bound in ((noise[0, :16], 5 / 12), (noise[0, 16:52], 5 / 18), (noise[1], 5 / 24)):
        assert 0.97 * bound < part.max() <= bound and 0.4 * bound < part.mean() < 0.6 * bound
    assert not noise[0, 52:].any()


def test_missing_inputs_are_named():
    inputs = losses.SftInputs(logp=jnp.zeros((1, 2)), mask=jnp.ones((1, 2)))
    for name, field in [("asft", "ref_kl"), ("iw_sft", "ref_logp"), ("z_loss", "logsumexp"), ("eaft", "topk_entropy"),
                        ("jsd", "teacher_divergence")]:  # fmt: skip
        with pytest.raises(UserError, match=f"SftInputs.{field}"):
            losses.get(name)(inputs)


def test_a_target_of_probability_zero():
    """p log p and its gradient tend to 0 with p; -log p is infinite, and no NaN."""
    inputs = losses.SftInputs(logp=jnp.array([[-jnp.inf, -1.0]]), mask=jnp.ones((1, 2)))
    value, _, grad = cases.value_and_grad(losses.get("dft"), inputs)
    np.testing.assert_allclose(value, exp(-1) / 2, rtol=1e-6)
    np.testing.assert_allclose(grad, [[0.0, -exp(-1) / 2]], rtol=1e-6)
    for name in ("nll", "focal"):
        value, _, grad = cases.value_and_grad(losses.get(name), inputs)
        assert value == np.inf and not np.any(np.isnan(grad)), name


def test_jsd_of_tokens_that_neither_model_can_emit():
    """As if these were not in the vocabulary."""
    student, teacher = np.array([1.0, -np.inf, 0.5]), np.array([0.2, -np.inf, 0.8])
    both = jax.value_and_grad(distill.generalized_jsd)(jnp.asarray(student), jnp.asarray(teacher))
    without = jax.value_and_grad(distill.generalized_jsd)(jnp.asarray(student[[0, 2]]), jnp.asarray(teacher[[0, 2]]))
    np.testing.assert_allclose(both[0], without[0], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(both[1])[[0, 2]], without[1], rtol=1e-5)
    assert both[1][1] == 0
