"""Policy losses: hand numbers, double-loop twins with finite differences, poison, microbatch split."""

import math

import jax
import jax.numpy as jnp
import losses_cases as cases
import losses_twin as twin
import numpy as np
import pytest
from losses_twin import clip, ppo

from jaxreason import losses
from jaxreason.errors import UserError
from jaxreason.losses import kl, policy, select
from jaxreason.losses.inputs import clean, totals_of
from jaxreason.losses.reduce import reduction_weights
from jaxreason.types import Totals

exp, log = math.exp, math.log


# name, options, token loss of the twin (sequence, position), aggregation
def token_ppo(low, high):
    return lambda s, t: ppo(s.ratio(t), s.advantages[t], low, high)


def sequence_ppo(low, high):
    return lambda s, t: ppo(exp(s.mean_log_ratio()), s.advantages[t], low, high)


def gspo_token(s, t):
    w = exp(s.mean_log_ratio(frozen=True)) * exp(s.logp[t] - s.logp0[t])
    return ppo(w, s.advantages[t], 0.1, 0.2)


def reinforce(s, t):
    return -s.advantages[t] * s.logp[t]


def gmpo(s, t):
    a = s.advantages[t]
    logs = [s.logp[k] - s.old_logp[k] for k in range(s.n)]
    bound = [min(x, 0.4) if s.advantages[k] >= 0 else max(x, -0.4) for k, x in enumerate(logs)]
    return -exp(sum(bound) / s.n) * a


def sapo(s, t):
    a, tau = s.advantages[t], 1.0 if s.advantages[t] > 0 else 1.05
    return -4 / tau / (1 + exp(-tau * (s.ratio(t) - 1))) * a


def vespo(s, t):
    a = s.advantages[t]
    big = exp(s.n * s.mean_log_ratio(frozen=True))
    k, lam = (2, 3) if a >= 0 else (3, 2)
    return -(big**k) * exp(lam * (1 - big)) * a * s.logp[t]


def vespo_corrected(s, t):
    """IcePop at (0.9, 1.1) within W: a token outside counts 1e-8, and e^lambda W^k e^-lambda W with W at its floor is 0."""
    a = s.advantages[t]
    weights = [r if 0.9 <= (r := rho(s, k)) <= 1.1 else 1e-8 for k in range(s.n)]
    big = max(exp(s.n * s.mean_log_ratio(frozen=True)) * math.prod(weights), 1e-8)
    k, lam = (2, 3) if a >= 0 else (3, 2)
    return -(big**k) * exp(lam * (1 - big)) * a * s.logp[t]


def dppo(s, t):
    a, moved = s.advantages[t], exp(s.logp0[t]) - exp(s.old_logp[t])
    dropped = (moved > 0.1 and a > 0) or (moved < -0.1 and a < 0)
    return (0 if dropped else -s.ratio(t) * a) + 1e-3 * (s.logp[t] - s.old_logp[t]) ** 2


def moved(s, t, kl=False):
    """Distance of the token's probability p from the behaviour's q, and whether it rose."""
    p, q = exp(s.logp0[t]), exp(s.old_logp[t])
    if kl and max(p, q) >= 1:  # the data's noise makes some that are no probabilities
        return 0.0, p > q
    return (q * log(q / p) + (1 - q) * log((1 - q) / (1 - p)) if kl else abs(p - q)), p > q


def dppo_kl(s, t):
    far, rose = moved(s, t, kl=True)
    keep = far <= 0.01 or rose != (s.advantages[t] > 0)
    return -keep * min(s.ratio(t), 1.3) * s.advantages[t]


def dppo_reinforce(s, t):
    far, rose = moved(s, t)
    keep = far <= 0.1 or rose != (s.advantages[t] > 0)
    return -keep * min(exp(s.logp0[t] - s.old_logp[t]), 1.1) * s.advantages[t] * s.logp[t]


def dppo_tv(s, t):
    return dppo(s, t) - 1e-3 * (s.logp[t] - s.old_logp[t]) ** 2


def aspo(s, t):
    w, a = exp(s.logp0[t] - s.old_logp[t]), s.advantages[t]
    if (a > 0 and w > 1.3) or (a < 0 and w < 0.7):
        return 0.0
    return -min(1 / w if a > 0 else w, 1.2) * a * s.logp[t]


def fipo(s, t):
    a = s.advantages[t]
    ahead = [s.logp0[k] - s.old_logp[k] for k in range(s.n)]
    future = sum(0.5 ** ((k - t) / 2) * ahead[k] for k in range(t, s.n) if ahead[k] <= log(1.4))
    f = clip(exp(future), 0.9, 1.15)
    if a < 0 and ahead[t] > log(1.1):
        f = clip(f, 0.8, 1.0)
    w = s.ratio(t)
    return -f * min(min(w, 1.4) * a, clip(w, 0.8, 1.28) * a)


def ipo(s, t):
    return -(moved(s, t)[0] <= 0.05) * s.ratio(t) * s.advantages[t] + 1e-3 * (s.logp[t] - s.old_logp[t]) ** 2


def topr(s, t):
    a = s.advantages[t]
    return -(0.5 if a > 0 else 2.0 * min(exp(s.logp0[t] - s.old_logp[t]), 1.0)) * a * s.logp[t]


def dro(s, t):
    return -s.advantages[t] * s.logp[t] + 0.35 * (s.logp[t] - s.old_logp[t]) ** 2


def gmpo_corrected(s, t):
    """IS weights enter as their geometric mean."""
    return gmpo(s, t) * exp(sum(log(min(rho(s, k), 1.1)) for k in range(s.n)) / s.n)


def two_sided(s, t):
    w, a = s.ratio(t), s.advantages[t]
    return -min(min(w, 1.1) * a, clip(w, 0.8, 1.2) * a)


def dual_clip(s, t):
    a = s.advantages[t]
    return min(token_ppo(0.2, 0.2)(s, t), -1.1 * a) if a < 0 else token_ppo(0.2, 0.2)(s, t)


def opsm(s, t):
    drift = sum(s.old_logp[k] - s.logp0[k] for k in range(s.n)) / s.n
    return 0.0 if s.advantages[t] < 0 and drift > 0.0 else token_ppo(0.2, 0.2)(s, t)


def trajectory(s):
    return exp(s.n * s.mean_log_ratio())


def rho(s, t):
    return exp(s.old_logp[t] - s.sampler_logp[t])


def rho_all(s):
    return exp(sum(s.old_logp[k] - s.sampler_logp[k] for k in range(s.n)))


def rho_mean(s):
    return exp(sum(s.old_logp[k] - s.sampler_logp[k] for k in range(s.n)) / s.n)


def apart(s, k, form):
    """What verl's rollout_rs measures at a token, of its l = log rho."""
    l = s.old_logp[k] - s.sampler_logp[k]
    return {"k1": -l, "k2": l * l / 2, "k3": exp(l) - 1 - l}[form]


def kept(level, form, low, high):
    """grpo's loss where the measure is inside, which is of all of a sequence but for ``token``."""

    def loss(s, t):
        every = [apart(s, k, form) for k in range(s.n)]
        value = {"token": every[t], "seq_sum": sum(every), "seq_mean": sum(every) / s.n, "seq_max": max(every)}[level]
        return GRPO(s, t) * (low <= value <= high)

    return loss


def vaco(s, t):
    distance = sum(abs(rho(s, k) - 1) for k in range(s.n)) / s.n
    further = (s.old_logp[t] - s.sampler_logp[t]) * s.advantages[t] > 0
    return 0.0 if distance > 0.13 and further else GRPO(s, t)


def k3(s, t):
    d = s.ref_logp[t] - s.logp[t]
    return exp(d) - d - 1


def k2(s, t):
    return (s.ref_logp[t] - s.logp[t]) ** 2 / 2


GRPO = token_ppo(0.2, 0.2)
SEQ, TOK, SUM, CONST = "seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "token-sum/const"
def luffy(s, t):
    """p / (p + 0.3) in place of the ratio where the data answered."""
    p = exp(s.logp[t])
    return -(p / (p + 0.3) if s.expert[t] else s.ratio(t)) * s.advantages[t]


def chord(phi, mu=0.3):
    """1 - mu of the mean over the 10 tokens that were drawn, and mu of that over the 6 of the data, each as a share of 16."""
    def token_loss(s, t):
        if not s.expert[t]:
            return (1 - mu) * 16 / 10 * token_ppo(0.1, 0.2)(s, t)
        p = exp(s.logp0[t])
        return -mu * 16 / 6 * (p * (1 - p) if phi else 1) * s.logp[t]

    return token_loss


CASES = [
    ("grpo", {}, GRPO, SEQ),
    ("dr_grpo", {"max_completion_tokens": 5}, GRPO, CONST),
    ("distill", {}, lambda s, t: s.teacher_divergence[t], TOK),
    ("distill", {"distill_coef": 0.5, "distill_ratio_max": 1.1, "reduce": SEQ},
     lambda s, t: 0.5 * min(exp(s.logp0[t] - s.old_logp[t]), 1.1) * s.teacher_divergence[t], SEQ),
    ("grpo", {"distill_coef": 0.3, "correction": "icepop", "correction_min": 0.9, "correction_max": 1.1},
     lambda s, t: rho(s, t) * (0.9 <= rho(s, t) <= 1.1) * GRPO(s, t) + 0.3 * s.teacher_divergence[t], SEQ),
    ("dapo", {}, token_ppo(0.2, 0.28), TOK),
    ("bnpo", {}, GRPO, TOK),
    ("grpo", {"reduce": "prompt-mean"}, GRPO, "prompt-mean"),
    ("gspo", {"clip_low": 0.1, "clip_high": 0.2}, sequence_ppo(0.1, 0.2), SEQ),
    ("gspo", {}, sequence_ppo(3e-4, 4e-4), SEQ),
    ("gspo_token", {"clip_low": 0.1, "clip_high": 0.2}, gspo_token, SEQ),
    ("cispo", {"ratio_min": 0.8, "ratio_max": 1.3},
     lambda s, t: -clip(exp(s.logp0[t] - s.old_logp[t]), 0.8, 1.3) * s.advantages[t] * s.logp[t], TOK),
    ("gmpo", {}, gmpo, SEQ),
    ("rloo", {}, reinforce, SUM),
    ("reinforce", {}, reinforce, TOK),
    ("gpg", {}, reinforce, TOK),
    ("importance_sampling", {}, lambda s, t: -s.ratio(t) * s.advantages[t], TOK),
    ("reinforce_pp", {}, GRPO, TOK),
    ("reinforce_pp_baseline", {}, GRPO, TOK),
    ("lite_ppo", {}, GRPO, TOK),
    ("maxrl", {}, GRPO, SEQ),
    ("gdpo", {}, GRPO, SEQ),
    ("sapo", {}, sapo, SEQ),
    ("tic_grpo", {}, lambda s, t: ppo(trajectory(s), s.advantages[t], 0.2, 0.2), SEQ),
    ("tic_grpo_lc", {}, lambda s, t: -min(trajectory(s), 1.28) * s.advantages[t], SEQ),
    ("luspo", {"clip_low": 0.1, "clip_high": 0.2}, sequence_ppo(0.1, 0.2), SUM),
    ("vespo", {}, vespo, TOK),
    ("dppo", {"max_rise": 0.1, "max_fall": 0.1}, dppo, TOK),
    ("dppo", {"max_rise": 0.1, "max_fall": 0.1, "form": "reinforce", "ratio_cap": 1.1, "log_ratio_coef": 0.0},
     dppo_reinforce, TOK),
    ("dppo_kl", {"max_rise": 0.01, "max_fall": 0.01, "ratio_cap": 1.3}, dppo_kl, TOK),
    ("dppo_tv", {"max_rise": 0.1, "max_fall": 0.1}, dppo_tv, TOK),
    ("aspo", {"clip_low": 0.3, "clip_high": 0.3, "weight_max": 1.2}, aspo, TOK),
    ("fipo", {"ratio_cap": 1.4, "half_life": 2.0, "influence_low": 0.1, "influence_high": 0.15, "safe_ratio": 1.1}, fipo, TOK),
    *(("grpo", {"reject": f"{level}_k1", "reject_min": 0.9, "reject_max": 1.15}, kept(level, "k1", log(0.9), log(1.15)), SEQ)
      for level in ("token", "seq_sum", "seq_mean")),
    ("grpo", {"reject": "seq_sum_k1", "reject_max": 1.15}, kept("seq_sum", "k1", -log(1.15), log(1.15)), SEQ),
    *(("grpo", {"reject": f"{level}_{form}", "reject_max": bound}, kept(level, form, -1, bound), SEQ)
      for form in ("k2", "k3")
      for level, bound in (("token", 0.01), ("seq_sum", 0.04), ("seq_mean", 0.015), ("seq_max", 0.03))),
    ("grpo", {"reject": "seq_tv", "reject_max": 0.13}, vaco, SEQ),
    ("luffy", {"shape": 0.3, "max_completion_tokens": 5}, luffy, "token-sum/const"),
    ("chord", {"mu": 0.3, "clip_low": 0.1}, chord(True), TOK),
    ("chord", {"mu": 0.3, "clip_low": 0.1, "phi": False}, chord(False), TOK),
    ("chord", {"mu": 0.5, "mu_valley": 0.1, "mu_warmup_steps": 2, "mu_decay_steps": 4, "clip_low": 0.1},  # the third step
     chord(True, 0.1 + 0.4 * 0.5 * (1 + 0.5**0.5)), TOK),
    ("ipo", {"behaviour": "old", "max_rise": 0.05, "max_fall": 0.05}, ipo, TOK),
    ("topr", {"positive_weight": 0.5, "negative_weight": 2.0}, topr, SUM),
    ("dro", {"beta": 0.7}, dro, TOK),
    ("kimi15", {"beta": 0.7}, dro, SEQ),
    ("gmpo", {"correction": "tis", "correction_max": 1.1}, gmpo_corrected, SEQ),
    ("grpo", {"behaviour": "policy"}, lambda s, t: -exp(s.logp[t] - s.logp0[t]) * s.advantages[t], SEQ),
    ("grpo", {"reduce": "token-sum"}, GRPO, "token-sum"),
    ("grpo", {"reduce": "token-sum", "max_completion_tokens": 5}, lambda s, t: GRPO(s, t) / 5, "token-sum"),
    ("two_sided", {"ratio_cap": 1.1}, two_sided, SEQ),
    ("dual_clip", {"dual_clip": 1.1}, dual_clip, SEQ),
    ("opsm", {"off_policy_threshold": 0.0}, opsm, SEQ),
    ("grpo_entropy", {"entropy_coef": 0.1}, GRPO, SEQ),
    ("grpo", {"kl_coef": 0.3}, lambda s, t: GRPO(s, t) + 0.3 * k3(s, t), SEQ),
    ("dapo", {"kl_coef": 0.3, "kl_estimator": "k2"}, lambda s, t: token_ppo(0.2, 0.28)(s, t) + 0.3 * k2(s, t), TOK),
    ("grpo", {"kl_coef": 0.3, "kl_estimator": "k3_unbiased"},
     lambda s, t: GRPO(s, t) + 0.3 * s.ratio(t) * k3(s, t), SEQ),
    ("grpo", {"kl_coef": 0.3, "kl_estimator": "abs"},
     lambda s, t: GRPO(s, t) + 0.3 * abs(s.ref_logp[t] - s.logp[t]), SEQ),
    ("grpo", {"kl_coef": 0.3, "kl_estimator": "k2_unbiased", "kl_ratio": "policy"},
     lambda s, t: GRPO(s, t) + 0.3 * exp(s.logp[t] - s.logp0[t]) * k2(s, t), SEQ),
    ("grpo", {"kl_coef": 0.3, "kl_estimator": "k1_unbiased", "kl_ratio": "sampler"},
     lambda s, t: GRPO(s, t) + 0.3 * exp(s.logp[t] - s.sampler_logp[t]) * (s.logp[t] - s.ref_logp[t]), SEQ),
    ("grpo", {"correction": "tis_geometric", "correction_max": 1.05}, lambda s, t: min(rho_mean(s), 1.05) * GRPO(s, t), SEQ),
    ("grpo", {"correction": "seq_mask_tis", "correction_min": 0.95, "correction_max": 1.05},
     lambda s, t: rho(s, t) * (0.95 <= rho_mean(s) <= 1.05) * GRPO(s, t), SEQ),
    ("grpo", {"correction": "tis", "correction_max": 1.1}, lambda s, t: min(rho(s, t), 1.1) * GRPO(s, t), SEQ),
    ("grpo", {"correction": "tis_sequence"}, lambda s, t: min(rho_all(s), 2.0) * GRPO(s, t), SEQ),
    ("grpo", {"correction": "icepop", "correction_min": 0.9, "correction_max": 1.1},
     lambda s, t: rho(s, t) * (0.9 <= rho(s, t) <= 1.1) * GRPO(s, t), SEQ),
    ("grpo", {"correction": "mis", "correction_min": 0.8, "correction_max": 1.2},
     lambda s, t: rho_all(s) * (0.8 <= rho_all(s) <= 1.2) * GRPO(s, t), SEQ),
    ("grpo", {"correction": "geo_rs", "correction_min": 0.95, "correction_max": 1.05},
     lambda s, t: float(0.95 <= rho_mean(s) <= 1.05) * GRPO(s, t), SEQ),
    ("gspo", {"kl_coef": 0.3, "kl_estimator": "k3_unbiased", "kl_ratio": "surrogate", "clip_low": 0.1, "clip_high": 0.1},
     lambda s, t: sequence_ppo(0.1, 0.1)(s, t) + 0.3 * exp(s.mean_log_ratio()) * k3(s, t), SEQ),
    ("vespo", {"correction": "icepop", "correction_min": 0.9, "correction_max": 1.1}, vespo_corrected, TOK),
    ("grpo", {"behaviour": "sampler"},
     lambda s, t: ppo(exp(s.logp[t] - s.sampler_logp[t]), s.advantages[t], 0.2, 0.2), SEQ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "token_loss", "reduce"), CASES, ids=[f"{c[0]}-{k}" for k, c in enumerate(CASES)]
)
def test_twin(name, options, token_loss, reduce):
    loss = losses.get(name, **options)
    data = twin.arrays()
    value, grad = cases.check_rules(loss, cases.make("policy", data, keys=set(data)))

    def slow(data, frozen):
        result = twin.aggregate(reduce, token_loss, data, frozen, constant=5)
        if coef := loss.options["entropy_coef"]:
            result -= coef * data["entropy"][twin.MASK > 0].mean()
        return result

    np.testing.assert_allclose(value, slow(data, data), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, twin.finite_difference(slow, data, "logp"), rtol=1e-4, atol=1e-6)


def test_every_variant_has_a_twin_and_a_hand_number():
    picked = {"clip_cov", "kl_cov", "top_entropy", "real"}  # their twins are below
    assert {c[0] for c in CASES} | picked == set(losses.names("policy"))
    assert set(HAND) == set(losses.names("policy"))


def clipped(s, t, low, high):
    """Whether the clipped branch is the surrogate: nothing is left there to drop."""
    w, a = s.ratio(t), s.advantages[t]
    return clip(w, 1 - low, 1 + high) * a < w * a


def test_selected_tokens_twin():
    """Rules over the step: the covariance and entropy picks against sorting by hand, and their losses."""
    data, live = twin.arrays(), twin.MASK > 0
    a, x = data["advantages"], data["old_logp"]
    cov = (a - a[live].mean()) * (x - x[live].mean())
    top = np.zeros(live.shape)
    for where in sorted(zip(*np.nonzero(live)), key=lambda p: -cov[p])[:3]:  # floor(0.2 * 16 tokens) = 3
        top[where] = 1
    entropic = (live & (data["entropy"] >= np.quantile(data["entropy"][live], 0.75))).astype(float)
    data["picked"] = top

    for name, options, picked, token_loss in [
        ("kl_cov", {"cov_fraction": 0.2}, top,
         lambda s, t: -s.ratio(t) * s.advantages[t] + s.picked[t] * abs(s.logp[t] - s.old_logp[t])),
        ("clip_cov", {"cov_fraction": 0.2, "cov_low": -99, "cov_high": 99}, None,
         lambda s, t: (not s.picked[t] or clipped(s, t, 0.2, 1.0)) * ppo(s.ratio(t), s.advantages[t], 0.2, 1.0)),
        ("top_entropy", {"top_entropy": 0.25}, entropic, lambda s, t: s.picked[t] * token_ppo(0.2, 0.28)(s, t)),
    ]:  # fmt: skip
        loss = losses.get(name, **options)
        on_policy = cases.make("policy", data | {"logp": data["old_logp"]}, keys=loss.needs)
        found = np.asarray(loss.select(on_policy))
        if picked is None:  # random: the right number, all supervised
            assert found.sum() == 3 and not np.any(found[~live])
        else:
            np.testing.assert_array_equal(found > 0, picked > 0)
        # Means over the picked tokens are sums over all of the step, where a bonus needs them.
        np.testing.assert_allclose(found[live].mean(), 1.0 if name == "top_entropy" else 3 / 16, rtol=1e-6)
        data["picked"] = (found > 0).astype(float)
        inputs = cases.make("policy", data, keys=set(data))
        inputs = inputs.__class__(**vars(inputs) | {"selected": jnp.asarray(found, jnp.float32)})
        value, grad = cases.check_rules(loss, inputs)

        def slow(data, frozen, token_loss=token_loss):
            return twin.aggregate(TOK, token_loss, data, frozen)

        np.testing.assert_allclose(value, slow(data, data), rtol=1e-5)
        np.testing.assert_allclose(grad, twin.finite_difference(slow, data, "logp"), rtol=1e-4, atol=1e-6)


def test_rewards_as_labels_twin():
    """The gradient is REAL's own, by finite differences of its formula over whole prompts; the value is sum / (1 + sum).
    Group 0 holds sequences 7 (right), 9 and 1 (wrong), group 1 holds 2 (right), 5 and -3 (wrong)."""
    data = twin.arrays()
    sign = {7: 1.0, 2: 0.5, 9: -1.0, 1: 0.0, 5: -0.3, -3: -2.0}
    data["advantages"] = np.vectorize(sign.get)(twin.IDS)
    loss = losses.get("real", real_tau=0.4)
    assert loss.reselects and loss.needs == {"selected"}
    inputs = cases.make("policy", data, keys=set(data))
    inputs = inputs.__class__(**vars(inputs) | {"selected": loss.select(inputs)})
    value, grad = cases.check_rules(loss, inputs)

    def sums(data):
        found: dict[tuple[int, bool], float] = {}
        for where in twin.sequences():
            seq, (b, t) = twin.Seq(data, data, where), where[0]
            right = data["advantages"][b, t] > 0
            side = (int(twin.GROUPS[b, t]), bool(right))
            found[side] = found.get(side, 0.0) + exp((-1 if right else 1) * seq.mean_log_ratio() / 0.4)
        return found.values()

    assert len(sums(data)) == 4
    np.testing.assert_allclose(value, sum(x / (1 + x) for x in sums(data)) / 2, rtol=1e-5)
    slow = twin.finite_difference(lambda data, frozen: sum(log(1 + x) for x in sums(data)) / 2, data, "logp")
    np.testing.assert_allclose(grad, slow, rtol=1e-4, atol=1e-6)
    alone = cases.make("policy", data | {"advantages": np.ones((4, 7))}, keys=set(data))
    assert not np.any(loss.select(alone))  # all are right: nothing to tell apart


# Two sequences: one token with p .4 -> .6 (ratio 1.5) and A = 1; three tokens with p .4 -> .2 (ratio .5) and A = -1.
HAND = {
    "grpo": ({}, -0.2),  # (-1.2 + .8) / 2
    "importance_sampling": ({}, 0.0),  # (-1.5 + 3 * .5) / 4
    "dr_grpo": ({"max_completion_tokens": 10}, 0.06),  # (-1.2 + 3 * .8) / (2 * 10)
    "distill": ({}, 0.25),  # 1 nat on one of four tokens
    # the second sequence is the data's: (-1.5 + 3 * .2 / .3) / (2 * 10); .9 * -1.2 - .1 * .2 * .8 ln .2
    "luffy": ({"max_completion_tokens": 10}, 0.025),
    "chord": ({}, -1.0542490),
    "dapo": ({}, 0.28),  # (-1.28 + 3 * .8) / 4
    "bnpo": ({}, 0.3),  # (-1.2 + 3 * .8) / 4
    "gspo": ({}, -0.00035),  # (-1.0004 + .9997) / 2
    "gspo_token": ({}, -0.00035),
    "cispo": ({}, -0.4119796),  # (-1.5 ln .6 + 3 * .5 ln .2) / 4
    "gmpo": ({}, -0.4107523),  # (-e^.4 + e^-.4) / 2
    "rloo": ({}, -2.1587440),  # (-ln .6 + 3 ln .2) / 2
    "reinforce": ({}, -1.0793720),  # the same / 4
    "gpg": ({}, -1.0793720),
    "reinforce_pp": ({}, 0.3),
    "reinforce_pp_baseline": ({}, 0.3),
    "lite_ppo": ({}, 0.3),
    "maxrl": ({}, -0.2),
    "gdpo": ({}, -0.2),
    "sapo": ({}, -0.5369501),  # (-4 sigmoid(.5) + 4 / 1.05 sigmoid(-.525)) / 2
    "tic_grpo": ({}, -0.2),  # (-1.2 + max(.125, .8)) / 2
    "tic_grpo_lc": ({}, -0.5775),  # (-1.28 + .125) / 2
    "luspo": ({}, 0.99575),  # (-1.0025 + 3 * .998) / 2
    "vespo": ({}, 0.0505469),  # (-1.5^2 e^-1.5 ln .6 + 3 * .125^3 e^1.75 ln .2) / 4
    "dppo": ({"max_rise": 0.1, "max_fall": 0.3}, 0.3754014),  # (0 + 3 * .5 + .001 (ln^2 1.5 + 3 ln^2 .5)) / 4
    # KL of coins .4 and .6: .4 ln(.4/.6) + .6 ln(.6/.4) = .0811; of .4 and .2: .4 ln 2 + .6 ln(.6/.8) = .1046
    "dppo_kl": ({"max_rise": 0.08, "max_fall": 0.11}, 0.375),  # (0 + 3 * .5) / 4
    "dppo_tv": ({"max_rise": 0.1, "max_fall": 0.3}, 0.375),
    "aspo": ({"clip_low": 0.6, "clip_high": 0.6}, -0.5184016),  # (-ln .6 / 1.5 + 3 * .5 ln .2) / 4
    # F: ln 1.5; 1.75, 1.5 and 1 ln .5. f: 1.2; .35, 2^-1.5, .5. (-1.28 * 1.2 + .8 * 1.2035534) / 4
    "fipo": ({"half_life": 1.0, "influence_low": 0.65}, -0.1432893),
    "ipo": ({"behaviour": "old", "max_rise": 0.3, "max_fall": 0.15}, -0.3745986),  # (-1.5 + 0) / 4 + .0004014
    "topr": ({}, -0.9516656),  # (-ln .6 + .5 * 3 ln .2) / 2
    "dro": ({"beta": 2.0}, -0.6779312),  # (-ln .6 + 3 ln .2 + ln^2 1.5 + 3 ln^2 .5) / 4
    "kimi15": ({"beta": 2.0}, -0.2268787),  # (-ln .6 + ln^2 1.5 + ln .2 + ln^2 .5) / 2
    "two_sided": ({"ratio_cap": 0.5}, 0.15),  # (-min(.5, 1.2) + .8) / 2
    "dual_clip": ({"dual_clip": 0.7}, -0.25),  # (-1.2 + .7) / 2
    "clip_cov": ({}, 0.6),  # (0 + 3 * .8) / 4
    "kl_cov": ({"cov_kl_coef": 2.0}, 0.2027326),  # (-1.5 + 2 ln 1.5 + 3 * .5) / 4
    "top_entropy": ({}, -0.32),  # -1.28 / 4
    "opsm": ({}, -0.6),  # drift ln 2 > .5: (-1.2 + 0) / 2
    "real": ({}, 0.2222222),  # (1.5^-2 + 0) / 2, selected being 1 and 0
    "grpo_entropy": ({}, -0.202),  # -.2 - .001 * 2
}


def hand_inputs(**more):
    """The two sequences in a [4, 7] batch, so that nothing new is compiled."""

    def place(first, second):
        full = np.full((4, 7), 0.5)
        full[0, 0], full[1, :3] = first, second
        return jnp.asarray(full, jnp.float32)

    ids = jnp.asarray(np.repeat(np.arange(4)[:, None], 7, axis=1), jnp.int32)
    return losses.PolicyInputs(
        logp=place(log(0.6), log(0.2)),
        old_logp=place(log(0.4), log(0.4)),
        advantages=place(1.0, -1.0),
        mask=jnp.zeros((4, 7)).at[0, 0].set(1.0).at[1, :3].set(1.0),
        entropy=place(2.0, 2.0),
        sequence_ids=ids,
        group_ids=ids,
        **more,
    )


@pytest.mark.parametrize("name", HAND)
def test_hand_number(name):
    options, expected = HAND[name]
    loss = losses.get(name, **options)
    one = jnp.zeros((4, 7)).at[0, 0].set(1.0)
    more = {name: one for name in ("selected", "teacher_divergence") if name in loss.needs}
    if loss.extras:
        more["extras"] = {"sampled": 4 * one, "expert": jnp.zeros((4, 7)).at[1, :3].set(4 / 3)}
    value, _, _ = cases.evaluate_one(loss, hand_inputs(**more))
    np.testing.assert_allclose(value, expected, atol=2e-6)


def test_metrics_by_hand():
    _, metrics, _ = cases.evaluate_one(losses.get("grpo"), hand_inputs(sampler_logp=jnp.full((4, 7), log(0.8))))
    expected = {
        "clip_fraction": 1.0, "clip_high_fraction": 0.25, "clip_low_fraction": 0.75, "ratio_mean": 0.75,
        "ratio_max": 1.5, "ratio_min": 0.5, "ratio_square_mean": 0.75, "entropy": 2.0,
        "policy_kl": (0.5 - log(1.5) + 3 * (-0.5 - log(0.5))) / 4, "sampler_gap": log(2), "sampler_gap_max": log(2),
    }  # fmt: skip
    assert set(metrics) == set(expected)
    for key, number in expected.items():
        np.testing.assert_allclose(metrics[key], number, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "tic_grpo", "luspo"])
def test_ratios_and_kl_are_watched_by_token_whatever_the_loss_s_own_ratio_is(name):
    """One sequence with ratios 1.5 and 0.5, whose mean is e^{(log 1.5 + log 0.5)/2} = 0.866: GSPO's own, calmer one."""
    l = jnp.log(jnp.array([[1.5, 0.5]]))
    ones = jnp.ones((1, 2))
    inputs = losses.PolicyInputs(logp=l, old_logp=0 * l, advantages=ones, mask=ones, sequence_ids=jnp.ones((1, 2), int))
    _, metrics, _ = cases.evaluate_one(losses.get(name), inputs)
    assert float(metrics["ratio_max"]) == pytest.approx(1.5) and float(metrics["ratio_min"]) == pytest.approx(0.5)
    assert float(metrics["policy_kl"]) == pytest.approx((0.5 - log(1.5) - 0.5 - log(0.5)) / 2)


@pytest.mark.parametrize("reduce", ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "token-sum/const", "token-sum"])
def test_a_token_that_is_masked_weighs_nothing(reduce):
    zeros = jnp.zeros((2, 3))
    given = losses.PolicyInputs(logp=zeros, old_logp=zeros, advantages=zeros, mask=jnp.array([[1.0, 0, 1], [0, 0, 0]]))
    inputs, sequences = clean(given)
    weights = reduction_weights(reduce, inputs, sequences, totals_of(inputs, sequences), 10)
    assert (np.asarray(weights) > 0).tolist() == [[True, False, True], [False] * 3]


def test_extreme_ratios_stay_finite():
    """|log ratio| of 200 on supervised tokens: inf * 0 must not reach the gradient."""
    data = twin.arrays() | {
        "old_logp": np.where(np.arange(7) % 2, -200.0, 0.0) * np.ones((4, 7)),
        "ref_logp": -199 * np.ones((4, 7)),
    }
    data["logp"] = np.where(np.arange(7) % 2, -0.1, -200.0) * np.ones((4, 7))
    for name in losses.names("policy"):
        loss = losses.get(name, **({} if name == "rloo" else {"kl_coef": 0.1}))
        value, _, grad = cases.evaluate_one(loss, cases.make("policy", data, keys=loss.needs))
        assert np.isfinite(value) and np.all(np.isfinite(grad)), name


def test_strict_promotion_and_ranks():
    data = twin.arrays()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for name in losses.names("policy"):
            loss = losses.get(name)
            inputs = cases.make("policy", data, keys=loss.needs | {"ref_logp", "sampler_logp", "entropy"})
            jax.eval_shape(lambda inputs, loss=loss: cases.value_and_grad(loss, inputs), inputs)


def test_rows_without_ids_equal_rows_with_ids():
    data, loss = twin.arrays(), losses.get("gspo")
    ids = np.arange(4)[:, None] * np.ones((1, 7))
    one = loss(cases.make("policy", data, ids=None, groups=None, keys=()))[0]
    assert one == loss(cases.make("policy", data, ids=ids, groups=None, keys=()))[0]
    assert one != loss(cases.make("policy", data, groups=None, keys=()))[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k1_unbiased", "k3_unbiased"])
def test_beyond_its_clamp_a_kl_has_no_gradient(estimator):
    """Not through a ratio either; d is 25 and -25, the clamp 20, and the ratio e^.5."""
    logp, apart = jnp.array([[-1.0, -1.0, -1.0]]), jnp.array([[25.0, -25.0, 1.0]])

    def total(x):
        return kl.kl(x, logp + apart, estimator, log_ratio=x - logp + 0.5, log_ratio_clamp=20.0).sum()

    grad = jax.grad(total)(logp)
    assert not np.any(grad[0, :2]) and np.isfinite(grad[0, 2])


def test_a_step_of_padding_gives_zero():
    data = twin.arrays()
    for name in ("grpo", "dapo", "dr_grpo"):
        value, _, grad = cases.evaluate_one(losses.get(name), cases.make("policy", data, mask=0 * twin.MASK, keys=()))
        assert value == 0 and not np.any(grad)


def test_missing_inputs_are_named():
    inputs = cases.make("policy", twin.arrays(), keys=())
    for options, field in [({"kl_coef": 0.1}, "ref_logp"), ({"correction": "tis"}, "sampler_logp"),
                           ({"entropy_coef": 0.1}, "entropy"), ({"top_entropy": 0.2}, "entropy")]:  # fmt: skip
        with pytest.raises(UserError, match=f"PolicyInputs.{field}"):
            losses.get("grpo", **options)(inputs)


def test_microbatch_without_step_wide_inputs_is_refused():
    inputs = cases.make("policy", twin.arrays(), keys={"entropy"})
    part = inputs.__class__(**vars(inputs) | {"totals": Totals(jnp.float32(16), jnp.float32(6), jnp.float32(2))})
    with pytest.raises(UserError, match="group_tokens"):
        losses.get("grpo", reduce="prompt-mean")(part)
    with pytest.raises(UserError, match="selected"):
        losses.get("top_entropy")(part)


def test_rejection_by_hand():
    """Rho .5 at all tokens (k1 is ln 2, k2 .2402, k3 .1931, |rho - 1| .5), in sequences of 1 and 3; grpo is (-1.2, .8)."""
    inputs = hand_inputs(sampler_logp=jnp.full((4, 7), log(0.8)))
    for kind, low, high, expected in [
        ("token_k1", 0.5, 2.01, -0.2), ("token_k1", 0.5, 1.99, 0.0), ("token_k3", None, 0.2, -0.2),
        ("seq_sum_k2", None, 0.25, -0.6), ("seq_mean_k2", None, 0.25, -0.2), ("seq_max_k3", None, 0.19, 0.0),
        ("seq_tv", None, 0.51, -0.2), ("seq_tv", None, 0.49, -0.6),  # l < 0, so A > 0 brings it back, A < 0 further
    ]:  # fmt: skip
        loss = losses.get("grpo", reject=kind, reject_min=low, reject_max=high)
        value, metrics, _ = cases.evaluate_one(loss, inputs)
        np.testing.assert_allclose(value, expected, atol=2e-6, err_msg=f"{kind} {low} {high}")
        dropped = {-0.2: 0.0, -0.6: 0.75, 0.0: 1.0}[expected]
        np.testing.assert_allclose(metrics["rejected_fraction"], dropped, atol=1e-6)


def test_a_correction_is_normalized_over_the_step():
    """By hand: IcePop's rho is 2 at one token and .5 at three, of mean .875; of sequences' products 2 and .125, 1.0625."""
    sampler_logp = jnp.full((4, 7), log(0.8)).at[0, 0].set(log(0.2))
    inputs = hand_inputs(sampler_logp=sampler_logp)
    for kind, high, expected in [("icepop", 5.0, (-1.2 * 2 + 0.8 * 0.5) / 2 / 0.875),
                                 ("tis_sequence", 5.0, (-1.2 * 2 + 0.8 * 0.125) / 2 / 1.0625)]:  # fmt: skip
        loss = losses.get("grpo", correction=kind, correction_max=high, correction_normalize="step")
        assert loss.needs == {"sampler_logp", "selected"}
        value, _, _ = cases.evaluate_one(loss, inputs)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    for kind in ("tis", "tis_sequence"):
        loss, data = losses.get("grpo", correction=kind, correction_max=1.1, correction_normalize="step"), twin.arrays()
        value, grad = cases.check_rules(loss, cases.make("policy", data, keys=set(data)))
        every = [twin.Seq(data, data, where) for where in twin.sequences()]
        weights = [[min(rho(s, t) if kind == "tis" else rho_all(s), 1.1) for t in range(s.n)] for s in every]
        mean = np.mean([x for row in weights for x in (row if kind == "tis" else row[:1])])

        def token_loss(s, t, kind=kind, mean=mean):
            return GRPO(s, t) * min(rho(s, t) if kind == "tis" else rho_all(s), 1.1) / mean

        def slow(data, frozen, token_loss=token_loss):
            return twin.aggregate(SEQ, token_loss, data, frozen)

        np.testing.assert_allclose(value, slow(data, data), rtol=1e-5)
        np.testing.assert_allclose(grad, twin.finite_difference(slow, data, "logp"), rtol=1e-4, atol=1e-6)


def test_likelihood_of_what_earned_something():
    """VAPO's term: mu times the mean of -log pi over the tokens of sequences 7, 9 and 1 (4 + 1 + 5 of 16)."""
    data, right = twin.arrays(), np.isin(twin.IDS, (7, 9, 1))
    data["right"] = right.astype(float)
    loss = losses.get("dapo", positive_nll_coef=0.3)
    assert loss.extras == {"positive"}
    inputs = cases.make("policy", data, keys=set(data))
    share = jnp.asarray(np.where(right & (twin.MASK > 0), 16 / 10, 0.0), jnp.float32)
    inputs = inputs.__class__(**vars(inputs) | {"extras": {"positive": share}})
    value, grad = cases.check_rules(loss, inputs)

    def slow(data, frozen):
        nll = sum(-data["logp"][where] for where in zip(*np.nonzero(right & (twin.MASK > 0)))) / 10
        return twin.aggregate(TOK, token_ppo(0.2, 0.28), data, frozen) + 0.3 * nll

    np.testing.assert_allclose(value, slow(data, data), rtol=1e-5)
    np.testing.assert_allclose(grad, twin.finite_difference(slow, data, "logp"), rtol=1e-4, atol=1e-6)
    # By hand: the one token of the first sequence is right, so the term is -ln .6, whatever the four tokens of the step.
    inputs = hand_inputs(extras={"positive": jnp.zeros((4, 7)).at[0, 0].set(4.0)})
    value, _, _ = cases.evaluate_one(losses.get("grpo", positive_nll_coef=0.1), inputs)
    np.testing.assert_allclose(value, -0.2 - 0.1 * log(0.6), rtol=1e-6)
    with pytest.raises(UserError, match=r"PolicyInputs.extras\['positive'\].*positive_nll_coef 0.1"):
        losses.get("grpo", positive_nll_coef=0.1)(hand_inputs())


def test_adaptive_entropy_coefficient():
    assert policy.adapt_entropy_coef(0.01, entropy=0.1, target=0.2) == (0.01, pytest.approx(0.015))
    assert policy.adapt_entropy_coef(0.01, entropy=0.3, target=0.2) == (0.0, pytest.approx(0.005))
    assert policy.adapt_entropy_coef(0.001, entropy=0.3, target=0.2) == (0.0, 0.0)
    inputs = hand_inputs(entropy_coef=jnp.float32(0.01))
    np.testing.assert_allclose(cases.evaluate_one(losses.get("grpo"), inputs)[0], -0.22, rtol=1e-6)  # -.2 - .01 * 2


def test_the_coefficient_of_the_kl_may_be_given_with_the_inputs():
    """k3 with pi_ref = pi e^-1 is e^-1 at every token."""
    inputs = hand_inputs(ref_logp=hand_inputs().logp - 1.0, kl_coef=jnp.full((4, 7), 0.5))
    value, _, _ = cases.evaluate_one(losses.get("grpo", kl_coef=0.1), inputs)
    np.testing.assert_allclose(value, -0.2 + 0.5 * exp(-1), atol=1e-7)  # terms of .2 in float32 all but cancel
    np.testing.assert_allclose(cases.evaluate_one(losses.get("grpo"), inputs)[0], -0.2, rtol=1e-6)  # there is no KL to weigh


def test_clip_cov_draws_from_the_band_only():
    cov = jnp.asarray([[0.0, 2.0, 3.0, 9.0, 2.5, 4.0]])
    mask = jnp.asarray([[1.0, 1, 1, 1, 0, 1]])
    draws = [np.asarray(select.random_in_band(cov, mask, 1.0, 5.0, 0.3, jax.random.key(k))) for k in range(20)]
    assert {d.sum() for d in draws} == {1.0}  # floor(.3 * 5)
    assert set(np.nonzero(sum(draws))[1]) == {1, 2, 5}
