"""The token that is drawn: against the distribution worked out in NumPy, and the corners of truncation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.errors import UserError
from jaxreason.sampler import Sampling
from jaxreason.sampler.sampling import draw, sample, sequence_key, truncate


def sampling(**options) -> Sampling:
    return Sampling(max_completion_tokens=8, **options)


def draws(logits: np.ndarray, count: int, options: Sampling):
    """``count`` independent draws from one row of logits: one sequence each, as the engine keys them."""
    keys = jax.vmap(sequence_key, (None, None, None, 0))(7, 3, 1, jnp.arange(count))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return jax.jit(sample, static_argnums=3)(rows, keys, jnp.zeros(count, jnp.int32), options)


def chi_squared(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    observed = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    assert observed[~possible].sum() == 0
    expected = len(tokens) * probabilities[possible]
    return float(np.sum((observed[possible] - expected) ** 2 / expected))


def test_frequencies_match_temperature_and_top_p():
    logits = np.array([1.0, -0.5, 2.0, 0.3, -2.0, 1.4, 0.9])
    p = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    # Sorted: 0.453, 0.192, 0.109 … for tokens 2, 5, 0, 6, 3: four of them pass 0.85.
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), 0.85) + 1)
    assert size == 4
    nucleus = np.where(np.isin(np.arange(7), order[:size]), p, 0.0)
    nucleus /= nucleus.sum()

    tokens, behaviour_logp, policy_logp = map(np.asarray, draws(logits, 20_000, sampling(temperature=0.7, top_p=0.85)))

    assert chi_squared(tokens, nucleus) < 16.27  # 99.9% quantile of chi-squared with 3 degrees of freedom
    np.testing.assert_allclose(behaviour_logp, np.log(nucleus[tokens]), atol=1e-5)
    np.testing.assert_allclose(policy_logp, np.log(p[tokens]), atol=1e-5)


def test_frequencies_match_the_softmax_over_several_blocks():
    logits = np.random.default_rng(0).normal(0, 1, 300)
    p = np.exp(logits) / np.exp(logits).sum()
    tokens = np.asarray(draws(logits, 20_000, sampling())[0])
    # 299 degrees of freedom: mean 299, standard deviation √598; this is 4 of them above.
    assert chi_squared(tokens, p) < 299 + 4 * np.sqrt(598)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"top_k": 1}, [0, 0, 1, 0, 0]),
        ({"top_k": 2}, [0, 1, 1, 1, 0]),  # tokens 1 and 3 tie for the second place: both stay
        ({"top_k": 9}, [1, 1, 1, 1, 1]),
        ({"top_p": 0.39}, [0, 0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 1, 1, 1, 0]),
        ({"top_p": 0.93}, [1, 1, 1, 1, 0]),
        ({"top_k": 3, "top_p": 0.45}, [0, 0, 1, 0, 0]),  # renormalised over three tokens, 0.4 became 0.47
        ({"min_p": 0.55}, [0, 1, 1, 1, 0]),
        ({"min_p": 0.1}, [1, 1, 1, 1, 1]),
        ({"min_p": 1.0}, [0, 0, 1, 0, 0]),
    ],
)
def test_truncation_keeps(options, kept):
    p = np.array([0.1, 0.225, 0.4, 0.225, 0.05])
    weights = jnp.asarray(p / p.max(), jnp.float32)[None]
    np.testing.assert_array_equal(np.asarray(truncate(weights, sampling(**options)))[0] > 0, np.array(kept, bool))


def test_truncation_agrees_with_sorting_on_a_large_vocabulary():
    logits = np.random.default_rng(1).normal(0, 3, (4, 5000)).astype(np.float32)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    top_k = np.asarray(truncate(jnp.asarray(weights), sampling(top_k=50)))
    for row in range(4):
        np.testing.assert_array_equal(np.flatnonzero(top_k[row]), np.sort(np.argsort(-weights[row])[:50]))
    top_p = np.asarray(truncate(jnp.asarray(weights), sampling(top_p=0.9)))
    for row in range(4):
        order = np.argsort(-weights[row])
        mass = np.cumsum(weights[row][order].astype(np.float64)) / weights[row].sum(dtype=np.float64)
        np.testing.assert_array_equal(np.flatnonzero(top_p[row]), np.sort(order[: np.searchsorted(mass, 0.9) + 1]))


def test_greedy_takes_the_first_of_tied_logits_and_reports_temperature_one():
    logits = np.log([0.1, 0.3, 0.3, 0.3])
    tokens, behaviour_logp, policy_logp = draws(logits, 5, sampling(temperature=0.0))
    np.testing.assert_array_equal(tokens, 1)
    np.testing.assert_array_equal(behaviour_logp, 0)
    np.testing.assert_allclose(policy_logp, np.log(0.3), rtol=1e-5)


def test_draw_inverts_the_cumulative_distribution():
    weights = np.zeros((6, 400), np.float32)
    weights[:, [3, 130, 390]] = [1.0, 2.0, 1.0]
    uniform = jnp.array([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24])
    np.testing.assert_array_equal(draw(jnp.asarray(weights), uniform), [3, 3, 130, 130, 390, 390])


def test_draw_never_lands_on_weight_zero():
    # Tiny weights that vanish in the sum, zeros between, and a target at the very end.
    weights = np.zeros((2, 1000), np.float32)
    weights[0, 5], weights[0, 7], weights[1, 999] = 1.0, 1e-12, 1e-30
    for uniform in (0.0, 0.5, 1 - 2**-24):
        tokens = np.asarray(draw(jnp.asarray(weights), jnp.full(2, uniform, jnp.float32)))
        assert weights[0, tokens[0]] > 0 and tokens[1] == 999


def test_key_is_a_function_of_every_number():
    base = (7, 3, 1, 2)
    data = {tuple(np.asarray(jax.random.key_data(sequence_key(*base))))}
    for place in range(4):
        changed = [n + (i == place) for i, n in enumerate(base)]
        data.add(tuple(np.asarray(jax.random.key_data(sequence_key(*changed)))))
    assert len(data) == 5


@pytest.mark.parametrize(
    "options", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1},
                {"min_p": 1.5}],
)  # fmt: skip
def test_wrong_options_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        sampling(**options)


def test_a_completion_has_at_least_one_token():
    with pytest.raises(UserError, match="max_completion_tokens is 0"):
        Sampling(max_completion_tokens=0)
