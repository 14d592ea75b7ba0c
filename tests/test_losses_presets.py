"""``preset="trl"`` against TRL 1.x's formulas as loops over unpacked rows: a twin in addition to the vectors of
``test_losses_frameworks.py``."""

import math

import losses_cases as cases
import losses_twin as twin
import numpy as np
import pytest

from jaxreason import config as cfg
from jaxreason import losses
from jaxreason.errors import UserError
from jaxreason.rl import objective

exp = math.exp
B, T, BUDGET = 4, 7, 11
LENGTHS = (7, 1, 4, 3)


def rows(seed):
    rng = np.random.default_rng(seed)
    logp = -np.abs(rng.normal(size=(B, T)))
    old = logp + rng.normal(scale=0.4, size=(B, T))
    return {
        "logp": logp,
        "old_logp": old,
        "ref_logp": old + rng.normal(scale=0.4, size=(B, T)),
        "sampler_logp": old + rng.normal(scale=0.7, size=(B, T)),
        "entropy": np.abs(rng.normal(size=(B, T))),
        "advantages": np.repeat(rng.normal(size=(B, 1)), T, axis=1),
    }


def bounded(rho, mode, low, high):
    """TRL's vllm_importance_sampling_mode applied to one ratio."""
    inside = (low is None or rho >= low) and (high is None or rho <= high)
    if mode.endswith("mask"):
        return rho * inside
    return max(min(rho, math.inf if high is None else high), 0.0 if low is None else low)


def trl(
    loss_type, d, z, *, low=0.2, high=0.2, level="token", delta=None, beta=0.0, bias=True, quantile=1.0, threshold=None,
    vllm=None, rho_min=None, rho_max=3.0, bonus=0.0, temperatures=(1.0, 1.05), gamma=(2.0, 3.0, 3.0, 2.0),
):
    """One optimizer step of TRL 1.16, the settings as its GRPOConfig has them; ``z``: ``d`` with what it detaches held."""
    picked = [z["entropy"][i, t] for i in range(B) for t in range(LENGTHS[i])]
    cut = np.quantile(picked, 1 - quantile)
    table, entropies = [], []
    for i, n in enumerate(LENGTHS):
        a = d["advantages"][i, 0]
        log_w = [d["logp"][i, t] - d["old_logp"][i, t] for t in range(n)]
        held_w = [z["logp"][i, t] - z["old_logp"][i, t] for t in range(n)]
        gap = [z["old_logp"][i, t] - z["sampler_logp"][i, t] for t in range(n)]
        rho = [1.0] * n
        if vllm is not None:
            of = gap if vllm.startswith("token") else [sum(gap)] * n
            rho = [bounded(exp(x), vllm, rho_min, rho_max) for x in of]
        row = []
        for t in range(n):
            w = exp(sum(log_w) / n if level == "sequence" else log_w[t])
            held = exp(sum(held_w) / n if level == "sequence" else held_w[t])
            if loss_type == "cispo":
                x = -min(held, high) * a * d["logp"][i, t]
            elif loss_type == "sapo":
                tau = temperatures[0] if a > 0 else temperatures[1]
                x = -4 / tau / (1 + exp(-tau * (w - 1))) * a
            elif loss_type == "vespo":
                total = sum(min(max(v, -20), 20) for v in held_w)
                total += sum(math.log(max(r, 1e-8)) for r in rho)
                total = min(max(total, math.log(1e-8)), 20)
                k, lam = gamma[:2] if a >= 0 else gamma[2:]
                x = -exp(lam + k * total - lam * exp(total)) * a * d["logp"][i, t]
            else:
                x = -min((w if delta is None else min(w, delta)) * a, min(max(w, 1 - low), 1 + high) * a)
            if threshold is not None:
                drift = sum(z["sampler_logp"][i, s] - z["logp"][i, s] for s in range(n)) / n
                x *= a >= 0 or drift <= threshold
            x *= z["entropy"][i, t] >= cut
            x *= 1.0 if loss_type == "vespo" else rho[t]
            apart = d["ref_logp"][i, t] - d["logp"][i, t]
            row.append(x + beta * (exp(apart) - apart - 1) * (w if bias else 1))
            entropies += [d["entropy"][i, t]] * bool(z["entropy"][i, t] >= cut)
        table.append(row)
    total = sum(sum(row) for row in table)
    value = {
        "grpo": sum(sum(row) / len(row) for row in table) / B,
        "dapo": total / sum(LENGTHS),
        "dr_grpo": total / (B * BUDGET),
        "luspo": total / B,
    }[{"sapo": "grpo", "bnpo": "dapo", "cispo": "dapo", "vespo": "dapo"}.get(loss_type, loss_type)]
    return value - bonus * sum(entropies) / len(entropies)


# TRL's settings and our options: what its paper index recommends for a loss is our default.
NAMED = {
    "grpo": ("grpo", {}, {}),
    "bnpo": ("bnpo", {}, {}),
    "dr_grpo": ("dr_grpo", {}, {"max_completion_tokens": BUDGET}),
    "dapo": ("dapo", {"high": 0.28}, {}),
    "cispo": ("cispo", {"high": 5.0}, {}),
    "sapo": ("sapo", {}, {}),
    "luspo": ("luspo", {"level": "sequence", "low": 2e-3, "high": 2.5e-3}, {}),
    "vespo": ("vespo", {}, {}),
    "gspo": ("grpo", {"level": "sequence", "low": 3e-4, "high": 4e-4}, {}),
    "two_sided": ("grpo", {"delta": 4.0}, {}),
    "top_entropy": ("dapo", {"high": 0.28, "quantile": 0.2}, {}),
    "opsm": ("grpo", {"threshold": 0.5}, {}),
}
AXES = [
    ({}, {}),
    ({"beta": 0.3}, {"kl_coef": 0.3}),
    ({"beta": 0.3, "bias": False}, {"kl_coef": 0.3, "kl_estimator": "k3"}),
    ({"threshold": 0.05}, {"off_policy_threshold": 0.05}),
    ({"quantile": 0.3, "bonus": 0.1}, {"top_entropy": 0.3, "entropy_coef": 0.1}),
    ({"vllm": "token_truncate"}, {"correction": "tis"}),
    ({"vllm": "token_mask", "rho_min": 0.8, "rho_max": 1.2},
     {"correction": "icepop", "correction_min": 0.8, "correction_max": 1.2}),
    ({"vllm": "sequence_truncate"}, {"correction": "tis_sequence"}),
    ({"vllm": "sequence_mask"}, {"correction": "mis"}),
    ({"beta": 0.1, "quantile": 0.3, "threshold": 0.05, "vllm": "token_truncate", "rho_max": 1.1},
     {"kl_coef": 0.1, "top_entropy": 0.3, "off_policy_threshold": 0.05, "correction": "tis", "correction_max": 1.1}),
]  # fmt: skip
OTHERS = [
    ("grpo", {"high": 0.28, "delta": 1.3}, "grpo", {"clip_high": 0.28, "ratio_cap": 1.3}),
    ("grpo", {"level": "sequence", "low": 0.1, "high": 0.1, "beta": 0.2}, "gspo",
     {"clip_low": 0.1, "clip_high": 0.1, "kl_coef": 0.2}),
    ("dapo", {}, "dapo", {"clip_high": 0.2}),
    ("cispo", {"high": 1.1}, "cispo", {"ratio_max": 1.1}),
    ("cispo", {"high": 1.02, "level": "sequence"}, "cispo", {"ratio_max": 1.02, "ratio": "sequence_mean"}),
    ("sapo", {"temperatures": (0.5, 2.0)}, "sapo", {"tau_positive": 0.5, "tau_negative": 2.0}),
    ("luspo", {}, "luspo", {"ratio": "token", "clip_low": 0.2, "clip_high": 0.2}),
    ("vespo", {"gamma": (1.0, 2.0, 2.5, 1.5)}, "vespo",
     {"k_positive": 1.0, "lambda_positive": 2.0, "k_negative": 2.5, "lambda_negative": 1.5}),
]  # fmt: skip


def compare(ours, options, theirs, settings):
    """Values on three batches, and on the first the gradient by the log-probs against finite differences."""
    loss = losses.get(ours, preset="trl", **options)
    mask = np.arange(T) < np.array(LENGTHS)[:, None]
    ids = np.repeat(np.arange(B)[:, None], T, axis=1)
    data = [rows(seed) for seed in range(3)]
    inputs = [cases.make("policy", d, mask=mask, ids=ids, groups=ids, keys=set(d)) for d in data]
    values, _, grads = cases.evaluate(loss, inputs)
    what = f"{ours} {settings}"
    np.testing.assert_allclose(values[:3], [trl(theirs, d, d, **settings) for d in data], rtol=1e-5, atol=1e-6, err_msg=what)
    slow = twin.finite_difference(lambda d, z: trl(theirs, d, z, **settings), data[0], "logp")
    np.testing.assert_allclose(grads[0], slow, rtol=1e-4, atol=1e-6, err_msg=what)


@pytest.mark.parametrize("name", NAMED)
def test_trl(name):
    """Every axis of TRL's loss on every loss type, at the defaults of the preset."""
    theirs, settings, options = NAMED[name]
    for more, more_options in AXES:
        if name == "vespo" and more.get("vllm", "token").startswith("sequence"):
            continue  # TRL refuses it, and so do we
        compare(name, options | more_options, theirs, settings | more)


@pytest.mark.parametrize("case", range(len(OTHERS)))
def test_trl_at_other_settings(case):
    theirs, settings, ours, options = OTHERS[case]
    compare(ours, options, theirs, settings)


def test_trl_preset_in_a_config_has_its_kl():
    """``kl.estimator: null`` leaves the estimator to the preset; one that is named wins."""
    base = {
        "algorithm": "grpo", "run": {"name": "x"}, "model": {"preset": "embedded-tiny"},
        "data": {"source": "embedded:arithmetic"}, "train": {"steps": 1}, "loss": {"preset": "trl"},
    }  # fmt: skip
    for estimator, expected in ((None, "k3_unbiased"), ("k3", "k3")):
        config = cfg.build(base | {"kl": {"coef": 0.1, "estimator": estimator}})
        assert objective.find_loss(config).options["kl_estimator"] == expected
    assert losses.defaults("grpo")["kl_estimator"] == "k3"


def test_vespo_takes_only_corrections_by_token():
    with pytest.raises(UserError, match="use tis or icepop"):
        losses.get("vespo", correction="mis")


def test_options_win_over_a_preset_and_its_rules():
    """verl clamps k3 alone, so the clamps follow the estimator; what is named stays."""
    assert losses.get("grpo", preset="verl").options["kl_value_clamp"] == 10.0
    assert losses.get("grpo", preset="verl", kl_estimator="k2").options["kl_value_clamp"] is None
    assert losses.get("grpo", preset="verl", kl_estimator="k2", kl_value_clamp=3.0).options["kl_value_clamp"] == 3.0
    assert losses.get("grpo", preset="verl", dual_clip=None).options["dual_clip"] is None
    with pytest.raises(UserError, match="'tlr' is unknown; did you mean trl"):
        losses.get("grpo", preset="tlr")
    with pytest.raises(UserError, match="verl has no loss rloo; verl's RLOO is its clipped loss"):
        losses.get("rloo", preset="verl")
