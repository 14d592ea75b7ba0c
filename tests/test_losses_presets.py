"""``preset="trl"`` against TRL 1.x's formulas as loops over unpacked rows; verl and NeMo by their differences."""

import math

import losses_cases as cases
import numpy as np
import pytest
from losses_cases import fast_compiles  # noqa: F401  (an autouse fixture)

from jaxreason import losses
from jaxreason.errors import UserError

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
        "sampler_logp": old + rng.normal(scale=0.2, size=(B, T)),
        "entropy": np.abs(rng.normal(size=(B, T))),
        "advantages": np.repeat(rng.normal(size=(B, 1)), T, axis=1),
    }


def trl(loss_type, d, *, low, high, level="token", delta=None, beta=0.0, quantile=None, threshold=None, tis=None):
    """One optimizer step of TRL: loss_type and importance level as its GRPOConfig names them."""
    entropies = [d["entropy"][i, t] for i in range(B) for t in range(LENGTHS[i])]
    table, flat = [], []
    for i, n in enumerate(LENGTHS):
        a = d["advantages"][i, 0]
        log_w = [d["logp"][i, t] - d["old_logp"][i, t] for t in range(n)]
        mean_w = sum(log_w) / n
        row = []
        for t in range(n):
            w = exp(mean_w if level == "sequence" else log_w[t])
            if loss_type == "cispo":
                x = -min(w, high) * a * d["logp"][i, t]
            elif loss_type == "sapo":
                tau = 1.0 if a > 0 else 1.05
                x = -4 / tau / (1 + exp(-tau * (w - 1))) * a
            elif loss_type == "vespo":
                total = min(max(sum(min(max(v, -20), 20) for v in log_w), math.log(1e-8)), 20)
                k, lam = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
                x = -exp(lam + k * total - lam * exp(total)) * a * d["logp"][i, t]
            else:
                x = -min((w if delta is None else min(w, delta)) * a, min(max(w, 1 - low), 1 + high) * a)
            if threshold is not None:
                drift = sum(d["sampler_logp"][i, s] - d["logp"][i, s] for s in range(n)) / n
                x *= a >= 0 or drift <= threshold
            if quantile is not None:
                x *= d["entropy"][i, t] >= np.quantile(entropies, 1 - quantile)
            if tis is not None:
                x *= min(exp(d["old_logp"][i, t] - d["sampler_logp"][i, t]), tis)
            gap = d["ref_logp"][i, t] - d["logp"][i, t]
            row.append(x + beta * (exp(gap) - gap - 1))
        table.append(row)
        flat += row
    if loss_type in ("grpo", "sapo"):
        return sum(sum(r) / len(r) for r in table) / B
    if loss_type in ("bnpo", "dapo", "cispo", "vespo"):
        return sum(flat) / len(flat)
    return sum(flat) / (B * BUDGET) if loss_type == "dr_grpo" else sum(flat) / B  # luspo


CASES = [
    # TRL's name, its settings, ours, our options
    ("grpo", {"low": 0.2, "high": 0.2}, "grpo", {}),
    ("grpo", {"low": 0.2, "high": 0.2, "beta": 0.04}, "grpo", {"kl_coef": 0.04}),
    ("grpo", {"low": 0.2, "high": 0.28, "delta": 1.3}, "grpo", {"clip_high": 0.28, "ratio_cap": 1.3}),
    ("grpo", {"low": 0.1, "high": 0.1, "level": "sequence"}, "gspo", {"clip_low": 0.1, "clip_high": 0.1}),
    ("bnpo", {"low": 0.2, "high": 0.2, "beta": 0.1}, "bnpo", {"kl_coef": 0.1}),
    ("dr_grpo", {"low": 0.2, "high": 0.2, "beta": 0.1}, "dr_grpo", {"max_completion_tokens": BUDGET, "kl_coef": 0.1}),
    ("dapo", {"low": 0.2, "high": 0.28}, "dapo", {}),
    ("cispo", {"low": 0.2, "high": 5.0}, "cispo", {}),
    ("cispo", {"low": 0.2, "high": 1.1}, "cispo", {"ratio_max": 1.1}),
    ("sapo", {"low": 0.2, "high": 0.2}, "sapo", {}),
    ("vespo", {"low": 0.2, "high": 0.2}, "vespo", {}),
    ("luspo", {"low": 0.1, "high": 0.1, "level": "sequence"}, "luspo", {"clip_low": 0.1, "clip_high": 0.1}),
    ("dapo", {"low": 0.2, "high": 0.28, "beta": 0.1, "quantile": 0.3, "threshold": 0.05, "tis": 1.1}, "dapo",
     {"kl_coef": 0.1, "top_entropy": 0.3, "off_policy_threshold": 0.05, "correction": "tis", "correction_max": 1.1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "settings", "ours", "options"), CASES, ids=[f"{c[0]}-{k}" for k, c in enumerate(CASES)]
)
def test_trl(theirs, settings, ours, options):
    loss = losses.get(ours, preset="trl", **options)
    mask = np.arange(T) < np.array(LENGTHS)[:, None]
    ids = np.repeat(np.arange(B)[:, None], T, axis=1)
    data = [rows(seed) for seed in range(3)]
    inputs = [cases.make("policy", d, mask=mask, ids=ids, groups=ids, keys=set(d)) for d in data]
    values = cases.evaluate(loss, inputs)[0][: len(data)]
    np.testing.assert_allclose(values, [trl(theirs, d, **settings) for d in data], rtol=1e-5, atol=1e-6)


def test_other_presets_change_what_they_say():
    verl = losses.get("grpo", preset="verl").options
    assert (verl["dual_clip"], verl["kl_value_clamp"], verl["log_ratio_clamp"]) == (3.0, 10.0, 20.0)
    assert losses.get("gspo", preset="verl").options["ratio"] == "gspo_token"
    for preset in ("verl", "nemo"):
        options = losses.get("cispo", preset=preset).options
        assert (options["ratio_min"], options["ratio_max"]) == (0.8, 1.2)
    assert losses.get("grpo", preset="nemo").advantage == "rloo"
    assert losses.get("grpo", preset="verl", dual_clip=None).options["dual_clip"] is None
    with pytest.raises(UserError, match="trl, verl, nemo"):
        losses.get("grpo", preset="tlr")
