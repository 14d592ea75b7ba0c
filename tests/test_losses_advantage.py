"""Advantage estimators by hand, their identities, missing rewards, and per-token advantages."""

import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.errors import UserError
from jaxreason.losses import advantage, tokens

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "options", "rewards", "expected"),
    [
        # mean 1, sample std 1
        ("grpo", {"eps": 0.0}, [[0.0, 1.0, 2.0]], [[-1.0, 0.0, 1.0]]),
        # population std sqrt(2/3)
        ("grpo", {"eps": 0.0, "ddof": 0}, [[0.0, 1.0, 2.0]], [[-math.sqrt(1.5), 0.0, math.sqrt(1.5)]]),
        ("grpo", {"eps": 1.0}, [[0.0, 1.0, 2.0]], [[-0.5, 0.0, 0.5]]),
        # a missing reward counts nowhere: mean 1, std sqrt(2)
        ("grpo", {"eps": 0.0}, [[0.0, NAN, 2.0]], [[-math.sqrt(0.5), 0.0, math.sqrt(0.5)]]),
        ("center", {}, [[0.0, 1.0, 5.0]], [[-2.0, -1.0, 3.0]]),
        ("raw", {}, [[0.5, NAN]], [[0.5, 0.0]]),
        ("zero", {}, [[0.5, NAN]], [[0.0, 0.0]]),
        # others' means: 3, 2.5, .5
        ("rloo", {}, [[0.0, 1.0, 5.0]], [[-3.0, -1.5, 4.5]]),
        # the std is of the raw rewards: mean 2, squares 4 0 1 9, over 3
        ("lite_ppo", {"eps": 0.0}, [[0.0, 2.0], [1.0, 5.0]], np.array([[-1.0, 1.0], [-2.0, 2.0]]) / math.sqrt(14 / 3)),
        # others of the first 1: 0 0 1, mean 1/3, std sqrt(1/3); of a 0: 1 0 1
        ("grpo_loo", {"eps": 0.0}, [[1.0, 0.0, 0.0, 1.0]], np.array([[2, -2, -2, 2]]) / math.sqrt(3)),
        # the others of the second are equal: undivided
        ("grpo_loo", {"eps": 0.0}, [[0.0, 3.0, 0.0]], [[-1 / math.sqrt(2), 3.0, -1 / math.sqrt(2)]]),
        # largest 5, next 1, std sqrt(7)
        ("passk", {"eps": 0.0}, [[0.0, 5.0, 1.0]], [[0.0, 4 / math.sqrt(7), 0.0]]),
        # one right of four, sets of two: rho = 1 - 3/6 = 1/2, spread 1/2; wrong: 1/2 - C(2, 1)/C(3, 1) = -1/6
        ("passk_training", {"k": 2, "eps": 0.0}, [[1.0, 0.0, 0.0, 0.0]], [[1.0, -1 / 3, -1 / 3, -1 / 3]]),
        # three right of four: every set of two holds one
        ("passk_training", {"k": 2, "eps": 0.0}, [[1.0, 1.0, 1.0, 0.0]], [[0.0] * 4]),
        # k = 1 is the z-score by n: p = 1/2
        ("passk_training", {"k": 1, "eps": 0.0}, [[1.0, 1.0, NAN, 0.0, 0.0]], [[1.0, 1.0, 0.0, -1.0, -1.0]]),
        ("center", {"singleton": "raw"}, [[2.0, NAN], [0.0, 1.0]], [[2.0, 0.0], [-0.5, 0.5]]),
        # two of four rewards are not 0
        ("gpg", {"alpha": "nonzero"}, [[0.0, 1.0], [1.0, 0.0]], [[-1.0, 1.0], [1.0, -1.0]]),
        # centred 0 0 | -1 1: squares 2 over 3
        ("reinforce_pp_baseline", {}, [[0.0, 0.0], [1.0, 3.0]], np.array([[0.0, 0.0], [-1.0, 1.0]]) / math.sqrt(2 / 3)),
        ("maxrl", {"eps": 0.0}, [[0.0, 0.0, 0.0, 1.0]], [[-1.0, -1.0, -1.0, 3.0]]),
        # one of two groups is useful: alpha 2
        ("gpg", {}, [[0.0, 1.0], [1.0, 1.0]], [[-1.0, 1.0], [0.0, 0.0]]),
        ("gpg", {"f_norm": 4.0}, [[0.0, 1.0], [1.0, 1.0]], [[-0.25, 0.25], [0.0, 0.0]]),
    ],
)
def test_by_hand(name, options, rewards, expected):
    rewards = np.array(rewards, np.float32)
    found, _ = advantage.get(name, **options)(rewards, lengths_P_G=np.ones(rewards.shape))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# Groups of unequal size (NaN: no sample there, or no reward), one sample, none, all equal, and two ordinary ones.
UNEVEN = np.array([
    [0.3, -1.2, 2.0, 0.7, 0.1], [1.0, 0.0, NAN, NAN, 1.0], [0.5, NAN, NAN, NAN, NAN], [NAN] * 5, [0.7] * 4 + [NAN],
    [0.0, 1.0, 0.0, 0.0, 0.0],
])  # fmt: skip
LENGTHS = np.arange(30).reshape(6, 5) % 7 + 1


def mean(xs):
    return sum(xs) / len(xs) if xs else 0.0


def std(xs, ddof):
    return math.sqrt(sum((x - mean(xs)) ** 2 for x in xs) / (len(xs) - ddof)) if len(xs) > ddof else 0.0


def by_sample(function, rewards):
    """function(R, its group's rewards, all rewards) at every sample that has one; else 0."""
    groups = [[r for r in row if not math.isnan(r)] for row in rewards.tolist()]
    everything = [r for group in groups for r in group]
    return [
        [0.0 if math.isnan(r) else function(r, group, everything) for r in row] for row, group in zip(rewards.tolist(), groups)
    ]


def z_score(rewards, eps):
    return by_sample(lambda r, g, a: (r - mean(g)) / (std(g, 1) + eps), rewards)


def whitened(rewards, eps):
    return by_sample(lambda r, g, a: (r - mean(a)) / (std(a, 1) + eps), np.array(rewards))


def masked(values, rewards):
    return np.where(np.isnan(rewards), NAN, values)


def gpg(r, group, everything):
    groups = [[x for x in row if not math.isnan(x)] for row in UNEVEN.tolist()]
    useful = sum(len(g) for g in groups if len(set(g)) > 1)
    return len(everything) / useful * (r - mean(group))


def opo(rewards):
    """The baseline weighs each sample by its length."""
    found = np.zeros(rewards.shape)
    for p, row in enumerate(rewards):
        there = [g for g, r in enumerate(row) if not math.isnan(r)]
        for g in there if len(there) > 1 else []:
            found[p, g] = row[g] - sum(LENGTHS[p, k] * row[k] for k in there) / sum(LENGTHS[p, k] for k in there)
    return found


def loo(r, group, everything):
    others = list(group)
    others.remove(r)
    return (r - mean(others)) / (std(others, 1) + 1e-6 if len(set(others)) > 1 else 1.0) if others else 0.0


def passk(rewards):
    found = np.zeros(rewards.shape)
    for p, row in enumerate(rewards):
        group = sorted((r for r in row if not math.isnan(r)), reverse=True)
        if len(group) > 1:
            found[p, int(np.nanargmax(row))] = (group[0] - group[1]) / (std(group, 1) + 1e-6)
    return found


def passk_training(rewards):
    """Every set of k samples of a group, each with the best of its rewards, normalized; a sample's advantage is the mean over
    the sets that it is in."""
    found = np.zeros(rewards.shape)
    for p, row in enumerate(rewards):
        there = [g for g, r in enumerate(row) if not math.isnan(r)]
        sets = [(chosen, max(row[g] for g in chosen)) for chosen in itertools.combinations(there, min(4, len(there))) if chosen]
        best = [value for _, value in sets]
        for g in there if std(best, 0) > 0 else []:
            mine = [value for chosen, value in sets if g in chosen]
            found[p, g] = (mean(mine) - mean(best)) / (std(best, 0) + 1e-6)
    return found


GREEDY = np.array([0.5, NAN, -1.0, 0.0, 0.7, 2.0])


def remax(rewards):
    base = np.repeat(GREEDY[:, None], rewards.shape[1], axis=1)
    return [[0.0 if math.isnan(r - b) else r - b for r, b in zip(*rows)] for rows in zip(rewards.tolist(), base.tolist())]


def sequences_with_steps(rewards):
    """Completions of LENGTHS tokens with two steps or one: its last token ends one, and the middle one another."""
    rng = np.random.default_rng(7)
    groups = []
    for lengths in LENGTHS[: len(rewards), : rewards.shape[1]].tolist():
        row = []
        for n in lengths:
            end = np.array([t in (n // 2, n - 1) for t in range(n)], float)
            extras = {"step_end": end, "step_reward": rng.normal(size=n) * end, "sum_pi_squared": rng.random(n)}
            drawn = SimpleNamespace(policy_logp=-rng.random(n))
            row.append(SimpleNamespace(tokens=range(n), extras=extras, completion=drawn))
        groups.append(row)
    return groups


def process(rewards):
    """Double loops over steps, as the paper writes it: the sum over the steps that end at t or later."""
    found = []
    for row, group in zip(rewards.tolist(), sequences_with_steps(rewards)):
        steps = [[(t, s.extras["step_reward"][t]) for t in s.tokens if s.extras["step_end"][t]] if not math.isnan(r) else []
                 for r, s in zip(row, group)]  # fmt: skip
        every = [r for found_steps in steps for _, r in found_steps]
        spread = std(every, 1) + 1e-4
        found.append([[sum((r - mean(every)) / spread for end, r in mine if end >= t) for t in s.tokens]
                      for s, mine in zip(group, steps)])  # fmt: skip
    return found


def otb(rewards):
    """Loops over tokens: the rewards of those that are still there, weighted by what they gathered so far."""
    found = []
    for row, group in zip(rewards.tolist(), sequences_with_steps(rewards)):
        there = [(r, s) for r, s in zip(row, group) if not math.isnan(r)]

        def gathered(s, t):
            pi = np.exp(s.completion.policy_logp)
            return sum(1 - 2 * pi[k] + s.extras["sum_pi_squared"][k] for k in range(t + 1))

        def one(r, s, there=there, gathered=gathered):
            out = []
            for t in s.tokens:
                left = [(x, gathered(y, t)) for x, y in there if t < len(y.tokens)]
                base = sum(x * w for x, w in left) / (sum(w for _, w in left) + 1e-8) if len(left) > 1 else 0.0
                out.append(r - base if len(there) > 1 else 0.0)
            return out

        found.append([[0.0] * len(s.tokens) if math.isnan(r) else one(r, s) for r, s in zip(row, group)])
    return found


def by_token(rewards):
    """reinforce_pp: every reward once for each token of its completion."""
    flat = [r for r, n in zip(rewards.reshape(-1), LENGTHS.reshape(-1)) if not math.isnan(r) for _ in range(n)]
    return by_sample(lambda r, g, a: (r - mean(flat)) / std(flat, 1), rewards)


EXPERTS = np.arange(30).reshape(6, 5) % 5 == 1  # the second sample of every group, where there is one


def luffy(rewards):
    """Less the mean of what was drawn; a sample that is all there is gets 0."""
    found = []
    for row, own in zip(rewards.tolist(), EXPERTS.tolist()):
        drawn = [r for r, data in zip(row, own) if not data and not math.isnan(r)]
        alone = sum(not math.isnan(r) for r in row) == 1
        found.append([0.0 if math.isnan(r) or alone else r - (mean(drawn) if drawn else 0.0) for r in row])
    return found


SECOND = np.where(np.isnan(UNEVEN), NAN, np.sin(np.arange(30)).reshape(6, 5))  # another reward of the same samples
TWINS = {
    "grpo": lambda x: z_score(x, 1e-4),
    "center": lambda x: by_sample(lambda r, g, a: r - mean(g), x),
    "raw": lambda x: by_sample(lambda r, g, a: r, x),
    "zero": lambda x: by_sample(lambda r, g, a: 0.0, x),
    "rloo": lambda x: by_sample(lambda r, g, a: r - (sum(g) - r) / (len(g) - 1) if len(g) > 1 else 0.0, x),
    "lite_ppo": lambda x: by_sample(lambda r, g, a: (r - mean(g)) / (std(a, 1) + 1e-4), x),
    "grpo_loo": lambda x: by_sample(loo, x),
    "opo": opo,
    "passk": passk,
    "passk_training": passk_training,
    "remax": remax,
    "luffy": luffy,
    "process": process,
    "otb": otb,
    "reinforce_pp": by_token,
    "reinforce_pp_baseline": lambda x: whitened(masked(by_sample(lambda r, g, a: r - mean(g), x), x), 1e-8),
    "maxrl": lambda x: by_sample(lambda r, g, a: (r - mean(g)) / (mean(g) + 1e-6), x),
    "gpg": lambda x: by_sample(gpg, x),
    "tic_lc": lambda x: by_sample(lambda r, g, a: (r - mean(g)) / (std(g, 0) + 1e-6), x / LENGTHS),
    "gdpo": lambda x: whitened(masked(2 * np.array(z_score(x, 1e-4)) + 0.5 * np.array(z_score(SECOND, 1e-4)), x), 1e-4),
}


@pytest.mark.parametrize("name", TWINS)
def test_twin_on_uneven_groups(name):
    rewards = np.abs(UNEVEN) if name == "maxrl" else UNEVEN
    rewards = np.where(np.isnan(UNEVEN), NAN, UNEVEN > 0.5) if name == "passk_training" else rewards
    given = {"lengths_P_G": LENGTHS, "rewards_F_P_G": np.stack([rewards, SECOND]), "weights_F": np.array([2.0, 0.5])}
    given |= {"greedy_P": GREEDY, "expert_P_G": EXPERTS, "sequences_P_G": sequences_with_steps(rewards)}
    found, extras = advantage.get(name)(rewards, **given)  # each takes what it reads of it
    assert extras == {}
    if name == "reinforce_pp":  # [P][G] of [n], all tokens alike without a discount
        assert [[len(a) for a in row] for row in found] == np.where(np.isnan(rewards), 1, LENGTHS).tolist()
        found = np.array([[a[0] for a in row] for row in found])
    if name in ("process", "otb"):  # [P][G] of [n]
        for one, other in zip(itertools.chain(*found), itertools.chain(*TWINS[name](rewards)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert not any(np.any(a) for row, group in zip(np.isnan(rewards), found) for a, none in zip(group, row) if none)
        return
    np.testing.assert_allclose(found, TWINS[name](rewards), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found)[np.isnan(rewards)], 0.0)


def one_function(rewards):
    """What estimators read where there is one reward function and every completion is one token long."""
    lengths = np.ones(rewards.shape)
    drawn = SimpleNamespace(policy_logp=[-0.5])
    one = [
        [SimpleNamespace(tokens=(0,), extras={"step_end": [1.0], "step_reward": [r], "sum_pi_squared": [0.6]}, completion=drawn)
         for r in row] for row in rewards
    ]  # fmt: skip
    return {
        "rewards_F_P_G": rewards[None], "weights_F": np.ones(1), "lengths_P_G": lengths, "sequences_P_G": one,
        "greedy_P": np.nan_to_num(rewards[:, 0]), "expert_P_G": np.zeros(rewards.shape, bool),
    }  # fmt: skip


def test_every_estimator_has_a_twin():
    assert set(TWINS) == set(advantage.ESTIMATORS)


def test_binary_rewards_have_the_known_values():
    """Pass rate p, population std: sqrt((1-p)/p) and -sqrt(p/(1-p))."""
    for wins in range(1, 8):
        p = wins / 8
        rewards = np.array([[1.0] * wins + [0.0] * (8 - wins)])
        found = advantage.grpo(rewards, ddof=0, eps=0.0)[0]
        np.testing.assert_allclose(found[0], math.sqrt((1 - p) / p), rtol=1e-5)
        np.testing.assert_allclose(found[-1], -math.sqrt(p / (1 - p)), rtol=1e-5)


def test_leave_one_out_is_scaled_centring():
    rewards = np.random.default_rng(0).normal(size=(3, 5))
    np.testing.assert_allclose(advantage.rloo(rewards), 5 / 4 * advantage.center(rewards), rtol=1e-5)


def test_equal_rewards_give_exactly_zero_at_any_epsilon():
    """The mean of eight 0.1 is not 0.1 in float32; divided by a tiny eps it would be a signal."""
    rewards = np.full((2, 8), 0.1, np.float32)
    for name in set(advantage.ESTIMATORS) - {"raw", "tic_lc", "zero", "passk_training"}:
        options = {"eps": 0.0} if name not in ("center", "rloo", "gpg", "opo", "remax", "luffy") else {}
        assert not np.any(np.asarray(advantage.get(name, **options)(rewards, **one_function(rewards))[0])), name
    assert not np.any(advantage.tic_lc(rewards, np.full((2, 8), 7), eps=0.0))
    assert not np.any(advantage.passk_training(np.array([[1.0] * 8, [0.0] * 8]), eps=0.0))


def test_group_of_one_and_ungraded_group():
    rewards = np.array([[2.0, NAN], [NAN, NAN], [0.0, 1.0]])
    assert not np.any(advantage.grpo(rewards)[:2])
    np.testing.assert_array_equal(advantage.get("grpo", preset="verl")(rewards)[0][:2], [[2.0, 0.0], [0.0, 0.0]])
    for name in set(advantage.ESTIMATORS) - {"tic_lc", "raw", "passk_training"}:
        found = np.asarray(advantage.get(name)(rewards, **one_function(rewards))[0]).reshape(3, 2)
        assert np.all(np.isfinite(found)) and not np.any(found[1]) and found[0, 1] == 0, name


def test_presets():
    rewards = np.array([[0.0, 1.0, 2.0]])  # std 1
    np.testing.assert_allclose(advantage.get("grpo", preset="trl")(rewards)[0][0, 2], 1 / 1.0001, rtol=1e-7)
    assert advantage.get("tic_lc", preset="trl").options == {}  # 1e-4 would swamp a std of rewards per token
    np.testing.assert_allclose(advantage.get("grpo", preset="verl", eps=1.0)(rewards)[0][0, 2], 0.5, rtol=1e-7)


def test_whitening_by_token_counts_a_sample_as_often_as_it_has_tokens():
    """1 with three tokens and 0 with one: mean 3/4, squares 3/16 + 9/16 over 3."""
    rewards, lengths = np.array([[1.0, 0.0]]), np.array([[3, 1]])
    found = advantage.reinforce_pp(rewards, lengths, eps=0.0)
    np.testing.assert_allclose(found[0][0], [0.5] * 3, rtol=1e-6)
    np.testing.assert_allclose(found[0][1], [-1.5], rtol=1e-6)
    centred = advantage.reinforce_pp_baseline(rewards, lengths, whiten="token", eps=0.0)  # .5 and -.5: mean .25
    np.testing.assert_allclose(centred, [[0.5, -1.5]], rtol=1e-6)


def test_reinforce_pp_discounts():
    """gamma .5 over three tokens: .25 .5 1."""
    found = advantage.get("reinforce_pp", gamma=0.5, whiten="none")(np.array([[1.0]]), lengths_P_G=np.array([[3]]))[0]
    np.testing.assert_allclose(found[0][0], [0.25, 0.5, 1.0])


def test_maxrl_refuses_a_negative_mean():
    with pytest.raises(UserError, match=r"maxrl divides by a group's mean reward, and one has -0\.5: .* change its sign"):
        advantage.maxrl(np.array([[0.0, 1.0], [-1.0, 0.0]]))
    assert not np.any(jax.jit(advantage.maxrl)(jnp.array([[-1.0, 0.0]])))


def test_pass_at_k_training_wants_right_or_wrong():
    with pytest.raises(UserError, match=r"passk_training counts right and wrong answers, and a reward is 0\.5"):
        advantage.passk_training(np.array([[0.0, 1.0, 0.5]]))


def test_process_supervision_by_hand():
    """Step rewards 1 and 0 of the first, 1 of the second: mean 2/3, sample std sqrt(1/3); tokens before an end share it."""
    first = SimpleNamespace(tokens=range(4), extras={"step_end": [0, 1, 0, 1], "step_reward": [9, 1, 9, 0]})
    second = SimpleNamespace(tokens=range(2), extras={"step_end": [0, 1], "step_reward": [9, 1]})
    third = SimpleNamespace(tokens=range(2), extras={})  # nobody could grade it
    found = advantage.get("process", eps=0.0)(np.array([[0.3, 0.2, NAN]]), sequences_P_G=[[first, second, third]])[0]
    up, down = (1 / 3) / math.sqrt(1 / 3), (-2 / 3) / math.sqrt(1 / 3)
    for one, other in zip(found[0], ([up + down, up + down, down, down], [up, up], [0.0, 0.0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_optimal_token_baseline_by_hand():
    """pi .5 and sum pi^2 .5 give .5 a token. A right answer of two tokens, a wrong one of three: W is .5 | 1 at t = 0 | 1 of
    both, so B is 1/2 where both are; pi 1 of the first token of a third weighs nothing, so B there is not moved by it."""
    def sequence(pis, squares):
        drawn = SimpleNamespace(policy_logp=np.log(pis))
        return SimpleNamespace(tokens=range(len(pis)), extras={"sum_pi_squared": squares}, completion=drawn)

    group = [sequence([0.5] * 2, [0.5] * 2), sequence([0.5] * 3, [0.5] * 3), sequence([1.0], [1.0])]
    rewards = np.array([[1.0, 0.0, 1.0]])
    found = advantage.get("otb", eps=0.0)(rewards, sequences_P_G=[group])[0][0]
    for one, other in zip(found, ([0.5, 0.5], [-0.5, -0.5, 0.0], [0.5]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)
    found = advantage.get("otb", eps=0.0)(rewards - 1, sequences_P_G=[group])[0][0]
    np.testing.assert_allclose(found[1], [-0.5, -0.5, -1.0], atol=1e-7)  # alone at its third token, with nothing to compare
    found = advantage.get("otb", tail="baseline")(rewards - 1, sequences_P_G=[group])[0][0]
    assert found[1][2] == 0.0


def test_an_infinite_reward_is_named():
    for name in set(advantage.ESTIMATORS) - {"tic_lc", "gdpo", "process", "otb"}:
        with pytest.raises(UserError, match="the reward of sample 1 of group 0 is infinite"):
            given = {"lengths_P_G": np.ones((1, 2)), "greedy_P": np.zeros(1), "expert_P_G": np.zeros((1, 2))}
            advantage.get(name)(np.array([[0.0, np.inf]]), **given)


def test_length_correction():
    # R / length = .5, .25: mean .375, population std .125
    found = advantage.tic_lc(np.array([[1.0, 1.0]]), np.array([[2, 4]]), eps=0.0)
    np.testing.assert_allclose(found, [[1.0, -1.0]], rtol=1e-5)


def test_gdpo():
    rewards = np.array([[[0.0, 2.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 4.0]]])
    # z-scores: +-1/sqrt(2) or 0; weighted 1 and 2: group 0 +-(-1 + 2), group 1 +-2, in units of 1/sqrt(2)
    total = np.array([[1.0, -1.0], [-2.0, 2.0]]) / math.sqrt(2)
    expected = total / math.sqrt((total**2).sum() / 3)
    np.testing.assert_allclose(advantage.gdpo(None, rewards, np.array([1.0, 2.0]), np.ones((2, 2)), eps=0.0), expected, rtol=1e-5)


def test_informative_groups():
    rewards = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, NAN], [NAN, NAN]])
    np.testing.assert_array_equal(advantage.informative_groups(rewards), [False, True, False, False])


def test_unknown_names_suggest():
    with pytest.raises(UserError, match="did you mean rloo"):
        advantage.get("rlo")
    with pytest.raises(UserError, match=r"advantage\.options\.epsilon: grpo has no option epsilon"):
        advantage.get("grpo", epsilon=1e-4)
    assert advantage.get("tic_lc").reads == {"lengths_P_G"} and advantage.get("grpo").reads == frozenset()
    assert advantage.get("gdpo").reads == {"rewards_F_P_G", "weights_F", "lengths_P_G"}
    assert advantage.get("gdpo").fills == frozenset()


OWN = """
import numpy as np
from jaxreason import losses

def plain(rewards_P_G, *, scale: float = 1.0):
    return scale * (rewards_P_G - np.nanmean(rewards_P_G, axis=1, keepdims=True))

@losses.estimator(fills=("token_reward", "age"))
def by_token(rewards_P_G, lengths_P_G, sequences_P_G):
    ages = [[np.arange(len(s.tokens)) / 2 for s in group] for group in sequences_P_G]
    rewards = [[age * r for age, r in zip(row, rs)] for row, rs in zip(ages, rewards_P_G)]
    return [[np.full(int(n), r) for n, r in zip(*row)] for row in zip(lengths_P_G, rewards_P_G)], {"age": ages, "token_reward": rewards}

def wrong(rewards_P_G, *, case: str):
    return {
        "transposed": rewards_P_G.T, "flat": [1.0, 2.0], "a group short": [[1.0, 2.0], [3.0]], "infinite": rewards_P_G / 0.0,
        "deep": [[np.zeros((2, 2))] * 2] * 2, "tokens": [[np.zeros(7)] * 2] * 2, "text": [["a", "b"]] * 2, "none": None,
        "undeclared": (rewards_P_G, {"x": rewards_P_G}),
    }[case]

@losses.estimator(fills=("x",))
def lacks(rewards_P_G, *, case: str):
    return {"all": rewards_P_G, "numbers": (rewards_P_G, {"x": rewards_P_G}), "nan": (rewards_P_G, {"x": [[np.full(3, np.nan)] * 2] * 2})}[case]
"""  # noqa: E501


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("estimators") / "mine.py"
    path.write_text(OWN)
    return str(path)


def test_an_estimator_of_ones_own(mine):
    estimator = advantage.get(f"{mine}:plain", scale=2, preset="trl")
    assert (estimator.reads, estimator.fills, estimator.options) == (frozenset(), frozenset(), {"scale": 2.0})
    rewards = np.array([[0.0, 1.0], [3.0, NAN]])
    assert estimator(rewards, lengths_P_G=np.array([[1, 2], [3, NAN]])) == ([[-1.0, 1.0], [0.0, 0.0]], {})
    with pytest.raises(UserError, match=r"advantage\.options\.scal: plain has no option scal; did you mean scale"):
        advantage.get(f"{mine}:plain", scal=1.0)
    with pytest.raises(UserError, match=r"advantage\.name .*mine\.py:plan: .* did you mean plain"):
        advantage.get(f"{mine}:plan")


def test_an_estimator_of_ones_own_fills_extras_and_advantages_by_token(mine):
    estimator = advantage.get(f"{mine}:by_token")
    assert estimator.reads == {"lengths_P_G", "sequences_P_G"} and estimator.fills == {"token_reward", "age"}
    sequences = [[SimpleNamespace(tokens=(5, 6, 7)), SimpleNamespace(tokens=(5,))]]
    given = {"lengths_P_G": [[3, 1]], "sequences_P_G": sequences, "weights_F": None}
    advantages, extras = estimator(np.array([[2.0, -1.0]]), **given)
    np.testing.assert_array_equal(advantages[0][0], [2.0, 2.0, 2.0])
    np.testing.assert_array_equal(advantages[0][1], [-1.0])
    np.testing.assert_array_equal(extras["token_reward"][0][0], [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(extras["age"][0][1], [0.0])
    assert advantages[0][0].dtype == extras["age"][0][0].dtype == np.float32


@pytest.mark.parametrize(
    ("function", "case", "message"),
    [
        ("wrong", "transposed", r"advantages hold groups of \[2, 2, 2\] samples, but the rewards have \[3, 3\]"),
        ("wrong", "flat", r"advantages must be nested lists \[2\]\[2\] of numbers or arrays"),
        ("wrong", "a group short", r"groups of \[2, 1\] samples, but the rewards have \[2, 2\]"),
        ("wrong", "infinite", r"advantages\[0\]\[0\] is inf; finite"),
        ("wrong", "deep", r"advantages\[0\]\[0\] has shape \(2, 2\)"),
        ("wrong", "tokens", r"advantages\[0\]\[0\] has shape \(7,\); one number for each of its 3 tokens"),
        ("wrong", "text", "could not convert string to float"),
        ("wrong", "none", "must be nested lists"),
        ("wrong", "undeclared", r"declares fills=\[\] but returned extras \['x'\]"),
        ("lacks", "all", r"declares fills=\['x'\] but returned extras \[\]"),
        ("lacks", "numbers", r"extras\['x'\]\[0\]\[0\] has shape \(\); one number for each of its 3 tokens"),
        ("lacks", "nan", r"extras\['x'\]\[0\]\[0\] is \[nan nan nan\]"),
    ],
)
def test_what_an_estimator_of_ones_own_returns_is_checked(function, case, message, mine):
    rewards = np.ones((2, 3 if case == "transposed" else 2))
    with pytest.raises(UserError, match=rf"^advantage\.name .*mine\.py:{function}: .*{message}"):
        advantage.get(f"{mine}:{function}", case=case)(rewards, lengths_P_G=np.full(rewards.shape, 3))


def test_an_estimator_is_given_what_it_can_be_given(mine):
    with pytest.raises(TypeError, match="an estimator is given .*, not length"):
        advantage.get("grpo")(np.ones((1, 2)), length=3)


def test_reward_to_go():
    ids = jnp.asarray([[0, 0, 0, 1, 1, 1]])
    live = jnp.asarray([[1, 0, 1, 1, 1, 0]]) > 0
    rewards = jnp.asarray([[1.0, 9.0, 2.0, 4.0, 8.0, 9.0]])
    rows = tokens.sequences_of(live, ids)
    np.testing.assert_allclose(tokens.reward_to_go(rewards, rows), [[3.0, 0, 2, 12, 8, 0]])
    np.testing.assert_allclose(tokens.reward_to_go(rewards, rows, 0.5), [[2.0, 0, 2, 8, 8, 0]])


def test_reinforce_pp_tokens():
    """Two sequences in a row, kl_coef 1: -k1 and the score at the last token, summed from the right, whitened."""
    old = np.array([[0.0, -1.0, 0.0, -2.0]])
    ref = np.array([[0.0, -2.0, -1.0, 5.0]])  # k1 = 0, 1, 1, masked
    score = np.array([[3.0, 3.0, 5.0, 5.0]])
    mask, ids = np.array([[1, 1, 1, 0]]), np.array([[0, 0, 1, 1]])
    returns = np.array([2.0, 2.0, 4.0])  # (-0 + (3 - 1)), 3 - 1, 5 - 1
    found = tokens.reinforce_pp_tokens(
        jnp.asarray(score), jnp.asarray(old), jnp.asarray(ref), jnp.asarray(mask), jnp.asarray(ids), kl_coef=1.0
    )
    np.testing.assert_allclose(found[0, :3], (returns - returns.mean()) / returns.std(ddof=1), rtol=1e-5)
    assert found[0, 3] == 0
