"""Estimators against numbers worked out by hand, exact enumeration and simulation."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from jaxreason.evaluate import estimates


def test_wilson_is_scipy_s_own():
    for right, count in ((0, 10), (3, 10), (10, 10), (470, 500)):
        found = stats.binomtest(right, count).proportion_ci(method="wilson")
        np.testing.assert_allclose(estimates.wilson(right, count), found, atol=1e-12)
    assert estimates.wilson(0, 0) == (0.0, 1.0)


def test_one_sample_a_problem_is_wilson_s_interval():
    found = estimates.clustered(np.array([[1.0], [0.0], [0.0], [1.0], [1.0]]))
    assert (found.mean, found.low, found.high) == (0.6, *estimates.wilson(3, 5))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_alike_is_as_sure_as_its_problems_are_many(value):
    """Four samples of ten problems, all wrong: the samples say nothing about other problems."""
    found = estimates.clustered(np.full((10, 4), value))
    assert (found.low, found.high) == estimates.wilson(10 * value, 10) and found.high - found.low > 0.2


def test_samples_that_agree_are_one_and_those_that_do_not_are_many():
    """Problems that are all right or all wrong are worth one sample each; problems that are half right K."""
    agree, mixed = np.repeat([[1.0], [0.0]] * 20, 4, axis=1), np.tile([1.0, 0.0, 1.0, 0.0], (40, 1))
    assert (estimates.clustered(agree).low, estimates.clustered(agree).high) == estimates.wilson(20, 40)
    z = float(stats.t.ppf(0.975, 39))
    assert estimates.clustered(mixed).low == pytest.approx(estimates.wilson(80, 160, z)[0])
    # Means 1/4 and 3/4, twenty each: s² = 40/39 / 16, n = 0.25 · 40 / s² = 156.
    quarter = np.array([[1.0, 0, 0, 0], [1, 1, 1, 0]] * 20)
    assert estimates.clustered(quarter).low == pytest.approx(estimates.wilson(78, 156, z)[0])


@pytest.mark.parametrize(("problems", "samples", "a", "b"), [(100, 1, 1, 1), (100, 4, 1, 1), (200, 8, 0.5, 0.5), (50, 4, 1, 3)])
def test_intervals_cover_the_truth(problems, samples, a, b):
    """Problems of Beta(a, b) difficulty, 6000 experiments: 95 ± 1 %."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(6000):
        difficulty = rng.beta(a, b, (problems, 1))
        found = estimates.clustered((rng.random((problems, samples)) < difficulty).astype(float))
        hits += found.low <= a / (a + b) <= found.high
    assert 0.94 <= hits / 6000 <= 0.96


def test_paired_intervals_cover_the_truth():
    """The second model is worse by 0.1 on every problem: a − b has the mean 0.1, over 800 experiments of 100 problems."""
    rng, hits = np.random.default_rng(1), 0
    for number in range(800):
        difficulty = rng.uniform(0.1, 1, (100, 1))
        one, other = (rng.random((100, 4)) < difficulty - less for less in (0.0, 0.1))
        found = estimates.paired(one.mean(axis=1), other.mean(axis=1), number)
        hits += found.low <= 0.1 <= found.high
    assert 0.935 <= hits / 800 <= 0.965  # three standard errors of 800 experiments are 2.3 %


def test_a_difference_that_is_everywhere_the_same_is_not_certain():
    found = estimates.paired(np.ones(4), np.ones(4))
    assert found.mean == 0.0 and not found.excludes_zero and found.high == pytest.approx(estimates.wilson(0, 4)[1])
    found = estimates.paired(np.ones(40), np.zeros(40))
    assert found.mean == found.high == 1.0 and 0.9 < found.low < 1.0
    assert not estimates.paired(np.zeros(0), np.zeros(0)).excludes_zero
    assert estimates.paired(np.zeros(1), np.ones(1)).high > -1.0


def test_a_difference_of_many_problems_needs_little_memory():
    """Of 6,000 problems all of the correction's resamples at once would be 290 MB; MMLU has 14,000."""
    tracemalloc.start()
    found = estimates.paired(np.arange(6_000) % 2, np.zeros(6_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.48 < found.low < 0.5 < found.high < 0.52 and peak < 150e6


def test_pass_at_k_is_the_mean_over_all_subsets():
    right = np.array([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]])
    for k in range(1, 6):
        every = [right[:, list(chosen)].max(axis=1) for chosen in itertools.combinations(range(5), k)]
        assert estimates.pass_at_k(right, k).mean == pytest.approx(np.mean(every))
    assert estimates.pass_at_k(right[:1], 2).mean == pytest.approx(1 - math.comb(3, 2) / math.comb(5, 2))
    assert estimates.pass_at_k(right, 1).mean == estimates.clustered(right).mean
    with pytest.raises(ValueError, match="needs between 1 and 5"):
        estimates.pass_at_k(right, 6)


def test_consensus_counts_answers_and_shares_ties():
    answers = [["a", "b", "a"], ["a", None, "b"], [None, None, None], ["c", "c", "b"]]
    right = np.array([[1.0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 1]])
    assert estimates.consensus(answers, right).mean == (1 + 0.5 + 0 + 0) / 4
    assert estimates.vote(["b", "a", None, "a", "b"]) == ["b", "a"] and estimates.vote([None]) == []
