"""Identities of the literature, as tests."""

import dataclasses

import jax
import jax.numpy as jnp
import losses_cases as cases
import losses_twin as twin
import numpy as np
import pytest

from jaxreason import losses
from jaxreason.errors import UserError
from jaxreason.losses import distill
from jaxreason.losses.kl import kl
from jaxreason.losses.surrogate import Tokens, sapo

Z = jnp.asarray([0.3, -1.0, 0.8, 0.1, -0.4])
Z_REF = jnp.asarray([-0.2, 0.5, 0.6, -1.0, 0.0])


def kl_exact(p, q):
    return jnp.sum(jnp.exp(p) * (p - q))


def expected_loss(estimator, z, z_old):
    """E over v ~ pi_old of the estimator as a loss, the sampling weights held fixed."""
    logp, ref, old = (jax.nn.log_softmax(x) for x in (z, Z_REF, z_old))
    values = kl(logp, ref, estimator, log_ratio=logp - jax.lax.stop_gradient(old))
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(old)) * values)


def exact_gradient(direction):
    ref = jax.nn.log_softmax(Z_REF)
    pair = {
        "reverse": lambda z: kl_exact(jax.nn.log_softmax(z), ref),
        "forward": lambda z: kl_exact(ref, jax.nn.log_softmax(z)),
    }
    return jax.grad(pair[direction])(Z)


@pytest.mark.parametrize(
    ("estimator", "direction"),
    [
        ("k1", None),
        ("k2", "reverse"),
        ("k3", "forward"),
        ("k1+", "reverse"),
        ("k3+", "reverse"),
        ("k3_unbiased", "reverse"),
    ],
)
def test_expected_kl_gradients(estimator, direction):
    found = jax.jit(jax.grad(lambda z: expected_loss(estimator, z, Z)))(Z)
    np.testing.assert_allclose(found, 0 * Z if direction is None else exact_gradient(direction), atol=1e-6)


def test_kl_values_are_unbiased():
    """On policy k1 and k3 average to KL(pi || ref); off policy r k3 still does, value and gradient."""
    exact = kl_exact(jax.nn.log_softmax(Z), jax.nn.log_softmax(Z_REF))
    for estimator in ("k1", "k3", "k1+", "k3+", "k3_unbiased"):
        np.testing.assert_allclose(expected_loss(estimator, Z, Z), exact, rtol=1e-5)
    off_policy = jax.value_and_grad(lambda z: expected_loss("k3_unbiased", z, Z + Z_REF))(Z)
    np.testing.assert_allclose(off_policy[0], exact, rtol=1e-5)
    np.testing.assert_allclose(off_policy[1], exact_gradient("reverse"), atol=1e-6)


def test_kl_clamps():
    far = kl(jnp.float32(0.0), jnp.float32(50.0), "k3", log_ratio=0.0, log_ratio_clamp=2.0)
    np.testing.assert_allclose(far, np.e**2 - 3, rtol=1e-6)
    assert kl(jnp.float32(0.0), jnp.float32(50.0), "k3", log_ratio=0.0, log_ratio_clamp=20.0, value_clamp=10.0) == 10


def test_at_ratio_one_clipped_losses_share_the_gradient_of_reinforce():
    """Up to aggregation, so all with token-mean; advantages equal within a sequence, as GRPO's are."""
    data = twin.arrays()
    per_sequence = np.take(np.random.default_rng(1).normal(size=20), twin.IDS + 3)
    data |= {"old_logp": data["logp"], "advantages": per_sequence}
    inputs = cases.make("policy", data, keys=())
    grads = {}
    for name in ("reinforce", "importance_sampling", "grpo", "cispo", "sapo", "gspo_token", "gmpo", "gspo", "dppo"):
        options = {"log_ratio_coef": 0.0} if name == "dppo" else {}
        grads[name] = cases.evaluate_one(losses.get(name, reduce="token-mean", **options), inputs)[2]
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, grads["reinforce"], atol=1e-7, err_msg=name)
    tic = cases.evaluate_one(losses.get("tic_grpo", reduce="seq-mean-token-mean"), inputs)[2]
    summed = cases.evaluate_one(losses.get("grpo", reduce="seq-mean-token-sum"), inputs)[2]
    np.testing.assert_allclose(tic, summed, atol=1e-7)


def test_gspo_token_equals_gspo_for_constant_advantages():
    data = twin.arrays()
    data["advantages"] = np.take(np.random.default_rng(2).normal(size=20), twin.IDS + 3)
    inputs = cases.make("policy", data, keys=())
    options = {"clip_low": 0.1, "clip_high": 0.1}
    a, b = (cases.evaluate_one(losses.get(n, **options), inputs) for n in ("gspo", "gspo_token"))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    np.testing.assert_allclose(a[2], b[2], atol=1e-7)


def test_cispo_gradient_is_the_clipped_ratio_times_the_advantage():
    data = twin.arrays()
    inputs = cases.make("policy", data, ids=None, groups=None, keys=())
    _, _, grad = cases.evaluate_one(losses.get("cispo", ratio_max=1.1), inputs)
    ratio = np.exp(data["logp"] - data["old_logp"])
    assert np.any(ratio > 1.1)
    expected = np.where(twin.MASK > 0, -np.minimum(ratio, 1.1) * data["advantages"] / 16, 0)
    np.testing.assert_allclose(grad, expected, atol=1e-6)


@pytest.mark.parametrize(("sign", "tau"), [(1.0, 1.0), (-1.0, 1.05)])
def test_sapo_slope_is_sech_squared(sign, tau):
    def f(w):
        x = Tokens(None, None, jnp.full((1, 1), sign), jnp.log(w).reshape(1, 1), None, None)
        return -sign * sapo(x).loss[0, 0]

    for w in (0.3, 1.0, 2.5):
        np.testing.assert_allclose(jax.grad(f)(w), 1 / np.cosh(tau * (w - 1) / 2) ** 2, rtol=1e-5)


def test_entropy_bonus_gradient():
    """The entropy bonus reaches the entropy input with weight -coef / tokens on supervised positions alone."""
    inputs = cases.make("policy", twin.arrays(), keys={"entropy"})
    loss = losses.get("grpo", entropy_coef=0.32)
    grad = jax.jit(jax.grad(lambda e: loss(dataclasses.replace(inputs, entropy=e))[0]))(inputs.entropy)
    np.testing.assert_allclose(grad, -0.02 * twin.MASK, atol=1e-8)  # 16 tokens


def test_jsd_limits():
    forward, reverse = distill.forward_kl(Z, Z_REF), distill.reverse_kl(Z, Z_REF)
    np.testing.assert_allclose(forward, kl_exact(jax.nn.log_softmax(Z_REF), jax.nn.log_softmax(Z)), rtol=1e-6)
    np.testing.assert_allclose(reverse, kl_exact(jax.nn.log_softmax(Z), jax.nn.log_softmax(Z_REF)), rtol=1e-6)
    assert distill.generalized_jsd(Z, Z_REF, beta=0.0) == forward
    assert distill.generalized_jsd(Z, Z_REF, beta=1.0) == reverse
    np.testing.assert_allclose(distill.generalized_jsd(Z, Z_REF, beta=1e-3) / 1e-3, forward, rtol=5e-3)
    np.testing.assert_allclose(distill.generalized_jsd(Z, Z_REF, beta=1 - 1e-3) / 1e-3, reverse, rtol=5e-3)
    half = distill.generalized_jsd(Z, Z_REF, beta=0.5)
    np.testing.assert_allclose(half, distill.generalized_jsd(Z_REF, Z, beta=0.5), rtol=1e-5)
    with pytest.raises(UserError, match=r"beta is 1\.5"):
        distill.generalized_jsd(Z, Z_REF, beta=1.5)


def test_skewed_divergences_by_hand():
    """p_T = (1, 0), p_S = (1/2, 1/2), alpha = 0.1: mixtures (0.55, 0.45) and (0.95, 0.05); bounded where the plain are not."""
    student, teacher = jnp.log(jnp.asarray([0.5, 0.5])), jnp.asarray([0.0, -jnp.inf])
    forward, grad = jax.value_and_grad(distill.skew_forward_kl)(student, teacher)
    np.testing.assert_allclose(forward, -np.log(0.55), rtol=1e-6)
    np.testing.assert_allclose(grad, [-0.45 / 1.1, 0.45 / 1.1], rtol=1e-5)  # -0.9 p_1 (e_1 - p) / 0.55
    reverse = distill.skew_reverse_kl(student, teacher)
    np.testing.assert_allclose(reverse, 0.5 * np.log(0.5 / 0.95) + 0.5 * np.log(0.5 / 0.05), rtol=1e-6)
    assert distill.reverse_kl(student, teacher) == np.inf
    np.testing.assert_array_equal(distill.skew_forward_kl(Z, Z_REF, alpha=0.0), distill.forward_kl(Z, Z_REF))
    np.testing.assert_array_equal(distill.skew_reverse_kl(Z, Z_REF, alpha=0.0), distill.reverse_kl(Z, Z_REF))


def test_adaptive_kl_by_hand():
    """p_T = (.2, .5, .3), p_S = (.5, .4, .1): gaps .3, .1, .2; a head of .5 has the likeliest token alone, one of .85 two."""
    teacher, student = jnp.log(jnp.asarray([0.2, 0.5, 0.3])), jnp.log(jnp.asarray([0.5, 0.4, 0.1]))
    forward, reverse = distill.forward_kl(student, teacher), distill.reverse_kl(student, teacher)
    for head, share in ((0.5, 1 / 6), (0.2, 1 / 6), (0.85, 0.5), (1.0, 1.0)):
        found = distill.adaptive_kl(student, teacher, head=head)
        np.testing.assert_allclose(found, share * forward + (1 - share) * reverse, rtol=1e-5)
    slope = jax.grad(distill.adaptive_kl)(student, teacher)  # the shares are held fixed
    parts = [jax.grad(f)(student, teacher) for f in (distill.forward_kl, distill.reverse_kl)]
    np.testing.assert_allclose(slope, parts[0] / 6 + parts[1] * 5 / 6, rtol=1e-5)
    value, slope = jax.value_and_grad(distill.adaptive_kl)(student, student)
    assert value == 0 and np.all(np.asarray(slope) == 0)


def test_the_likeliest_tokens_and_the_rest_by_hand():
    """p_T = (1/2, 1/4, 1/8, 1/8), p_S = (1/8, 1/8, 1/4, 1/2): the teacher's two leave 1/4 and 3/4, the student's 3/4 and 1/4."""
    teacher, student = jnp.log(jnp.asarray([4.0, 2, 1, 1])), jnp.log(jnp.asarray([1.0, 1, 2, 4]))
    found = losses.divergence("forward_kl", top_k=2)(student, teacher)
    np.testing.assert_allclose(found, 0.5 * np.log(4) + 0.25 * np.log(2) + 0.25 * np.log(1 / 3), rtol=1e-5)
    found = losses.divergence("reverse_kl", top_k=2, top_from="student")(student, teacher)
    np.testing.assert_allclose(found, 0.5 * np.log(4) + 0.25 * np.log(2) + 0.25 * np.log(1 / 3), rtol=1e-5)
    found = losses.divergence("forward_kl", top_k=2, tail=False)(student, teacher)  # (2/3, 1/3) and (1/2, 1/2)
    np.testing.assert_allclose(found, 2 / 3 * np.log(4 / 3) + 1 / 3 * np.log(2 / 3), rtol=1e-5)
    soft = losses.divergence("forward_kl", top_k=1, temperature=2.0)(student, teacher)
    p, q = 2 / (2 + 2 + 2**0.5), 1 / (2 + 2 + 2**0.5)  # roots of 4 2 1 1 and of 1 1 2 4
    np.testing.assert_allclose(soft, p * np.log(2) + (1 - p) * np.log((1 - p) / (1 - q)), rtol=1e-5)


@pytest.mark.parametrize("name", distill.DIVERGENCES)
def test_a_divergence_of_fewer_tokens_is_never_above_the_whole(name):
    """All tokens and an empty rest are the whole; adaptive_kl, whose weights are of other heads, keeps to no bound."""
    whole = losses.divergence(name)(Z, Z_REF)
    np.testing.assert_allclose(losses.divergence(name, top_k=99)(Z, Z_REF), whole, atol=1e-5)
    parts = [losses.divergence(name, top_k=k)(Z, Z_REF) for k in (1, 2, Z.shape[-1] - 1)]
    if name == "adaptive_kl":
        assert all(np.all(np.isfinite(part)) and np.all(part > 0) for part in parts)
    else:
        assert all(np.all(part <= whole + 1e-6) for part in parts) and np.all(parts[0] < whole)


def test_temperature_divides_both_models_logits():
    softened = distill.reverse_kl(Z / 2, Z_REF / 2)
    np.testing.assert_allclose(distill.reverse_kl(Z, Z_REF, temperature=2.0), softened, rtol=1e-6)
    both = distill.generalized_jsd(Z, Z_REF, beta=0.3, temperature=2.0)
    np.testing.assert_allclose(both, distill.generalized_jsd(Z / 2, Z_REF / 2, beta=0.3), rtol=1e-6)


def test_topk_entropy_by_hand():
    """Of (1/2, 1/4, 1/8, 1/8) the two largest make (2/3, 1/3)."""
    logits = jnp.log(jnp.asarray([[0.125, 0.5, 0.125, 0.25]]))
    by_hand = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    np.testing.assert_allclose(distill.topk_entropy(logits, 2), [by_hand], rtol=1e-6)
    np.testing.assert_allclose(distill.topk_entropy(logits, 9), [1.75 * np.log(2)], rtol=1e-6)


def test_jsd_by_hand_and_with_impossible_tokens():
    # p_S = (1/2, 1/2), p_T = (1, 0), beta 1/2: M = (3/4, 1/4)
    student, teacher = jnp.log(jnp.asarray([0.5, 0.5])), jnp.asarray([0.0, -jnp.inf])
    expected = 0.5 * np.log(4 / 3) + 0.5 * (0.5 * np.log(2 / 3) + 0.5 * np.log(2))
    value, grad = jax.jit(jax.value_and_grad(distill.generalized_jsd))(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(grad))
    np.testing.assert_allclose(distill.forward_kl(student, teacher), np.log(2), rtol=1e-6)
