"""Conventions of other frameworks: for each, the losses that it has, and the options in which its default config differs.

What a framework does not have is refused, so that a run with ``loss.preset`` is that framework's loss or does not start.
``tests/test_losses_frameworks.py`` compares every preset with numbers of the framework's own code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxreason.errors import UserError
from jaxreason.plugins import nearest

Changes = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """``losses``: the losses that it has, each with what it changes there in addition to ``every``. ``refused``: for some that
    it has not, what to write instead. ``follow``: options that others decide, from all that are known. ``advantage``: the
    estimator of a loss in place of its own. ``estimators``: what it changes in an estimator. ``kl_placement``: where the KL of
    every loss is; None: where its paper has it."""

    losses: Mapping[str, Changes]
    every: Changes = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    follow: Callable[[Mapping[str, Any]], Changes] | None = None
    advantage: Mapping[str, str] = field(default_factory=dict)
    estimators: Mapping[str, Changes] = field(default_factory=dict)
    kl_placement: str | None = None


def _trl_bounds(known: Mapping[str, Any]) -> Changes:
    """One pair of bounds for every mode; 0 and not None, which would be the correction's own bound. Others are not TRL's."""
    modes = ("tis", "tis_sequence", "icepop", "mis")
    return {"correction_min": 0.0, "correction_max": 3.0} if known["correction"] in modes else {}


def _verl_clamps(known: Mapping[str, Any]) -> Changes:
    """Only k3 is clamped."""
    k3 = known["kl_estimator"].startswith("k3")
    return {"kl_log_ratio_clamp": 20.0 if k3 else None, "kl_value_clamp": 10.0 if k3 else None}


_RAW = {"singleton": "raw"}
_VERL_Z = {"eps": 1e-6, "singleton": "raw"}
_SEQUENCES = {"reduce": "seq-mean-token-mean", "kl_reduce": "token-mean", "entropy_reduce": "token-mean"}

PRESETS: dict[str, Preset] = {
    # trl 1.16, trl/trainer/grpo_trainer.py
    "trl": Preset(
        losses={
            "grpo": {}, "bnpo": {}, "dr_grpo": {}, "dapo": {}, "gspo": {}, "cispo": {}, "sapo": {},
            "luspo": {}, "vespo": {}, "two_sided": {}, "top_entropy": {}, "opsm": {}, "grpo_entropy": {},
            "lite_ppo": {}, "gdpo": {},
        },
        every={
            "log_ratio_clamp": None,
            "sequence_count": "drawn",
            "kl_log_ratio_clamp": None,
            "kl_estimator": "k3_unbiased",
            "kl_ratio": "surrogate",
            "entropy_over": "top",
            "off_policy_behaviour": "sampler",
        },
        follow=_trl_bounds,
    ),
    # verl, verl/trainer/ppo/core_algos.py and verl/trainer/config/actor/actor.yaml
    "verl": Preset(
        losses={
            "grpo": {"dual_clip": 3.0},
            "dapo": {"dual_clip": 3.0},
            "dr_grpo": {"dual_clip": 3.0, "reduce": "token-sum/const"},
            "dual_clip": {},
            "grpo_entropy": {"dual_clip": 3.0},
            "reinforce_pp": {"dual_clip": 3.0},
            "reinforce_pp_baseline": {"dual_clip": 3.0},
            "gdpo": {"dual_clip": 3.0},
            "gspo": _SEQUENCES | {"ratio": "gspo_token", "log_ratio_clamp": 10.0},
            "gspo_token": _SEQUENCES | {"log_ratio_clamp": 10.0},
            "sapo": _SEQUENCES,
            "gmpo": _SEQUENCES | {"log_ratio_clamp": None},
            "cispo": {"ratio_min": 0.8, "ratio_max": 1.2},
            "gpg": {},
            "reinforce": {},
            "clip_cov": {"log_ratio_clamp": None},
            "kl_cov": {"log_ratio_clamp": None, "cov_kl_coef": 0.1},
            "dppo": {"form": "reinforce", "ratio_cap": 3.0, "log_ratio_coef": 0.0},
            "dppo_kl": {"form": "reinforce", "ratio_cap": 3.0, "max_rise": 0.2, "max_fall": 0.2},
            "dro": {"log_ratio_clamp": None},
        },
        every={"reduce": "token-mean", "sequence_count": "drawn", "entropy_reduce": None},
        refused={"rloo": "verl's RLOO is its clipped loss: loss.name=grpo advantage.name=rloo"},
        follow=_verl_clamps,
        estimators={
            "grpo": _VERL_Z, "center": _RAW, "rloo": _RAW, "opo": _RAW,
            "gpg": _RAW | {"alpha": "nonzero"}, "reinforce_pp_baseline": _RAW | {"whiten": "token"},
            "gdpo": _VERL_Z | {"whiten": "token"},
        },
    ),
    # NeMo-RL, nemo_rl/algorithms/loss/loss_functions.py and examples/configs/grpo_math_1B.yaml
    "nemo": Preset(
        losses={
            "grpo": {}, "dapo": {}, "gspo": {"reduce": "seq-mean-token-mean"}, "cispo": {"ratio_min": 0.8, "ratio_max": 1.2},
            "dual_clip": {}, "rloo": {}, "reinforce": {}, "reinforce_pp": {}, "reinforce_pp_baseline": {}, "gdpo": {},
        },
        every={
            "log_ratio_clamp": None, "reduce": "token-mean", "kl_coef": 0.01, "kl_estimator": "k3_unbiased", "kl_ratio": "policy",
            "kl_value_clamp": 10.0,
        },
        advantage=dict.fromkeys(("grpo", "dapo", "gspo", "cispo", "dual_clip"), "grpo_loo"),
        estimators={
            "grpo": {"eps": 1e-6}, "gdpo": {"eps": 1e-6, "baseline": "others"},
            "reinforce_pp": {"ddof": 0}, "reinforce_pp_baseline": {"ddof": 0, "whiten": "token"},
        },
        kl_placement="loss",
    ),
    # prime-rl, src/prime_rl/trainer/rl/loss.py
    "prime_rl": Preset(
        losses={"dppo": {}, "ipo": {}},
        every={"log_ratio_clamp": None, "behaviour": "sampler"},
        refused={
            "grpo": "prime-rl's grpo is an advantage: loss.name=dppo advantage.name=center",
            "maxrl": "prime-rl's max_rl is an advantage: loss.name=dppo advantage.name=maxrl",
        },
        estimators={"maxrl": {"eps": 0.0}},
    ),
    # open-instruct, open_instruct/grpo_utils.py
    "open_instruct": Preset(
        losses={"dapo": {"clip_high": 0.272}, "cispo": {"ratio_max": 1.272}},
        every={
            "log_ratio_clamp": None, "kl_coef": 0.05, "kl_log_ratio_clamp": 40.0, "correction": "tis",
        },
        advantage={"dapo": "center", "cispo": "center"},
        estimators={"grpo": {"ddof": 0, "eps": 1e-8}},
    ),
    # slime, slime/backends/megatron_utils/loss.py and slime/utils/arguments.py
    "slime": Preset(
        losses={
            "grpo": {}, "gspo": {}, "cispo": {"ratio_min": 0.8, "ratio_max": 1.2}, "reinforce_pp": {},
            "reinforce_pp_baseline": {}, "dual_clip": {}, "opsm": {"off_policy_threshold": 1e-4}, "grpo_entropy": {},
            "dapo": {"reduce": "token-mean"},
        },
        every={
            "log_ratio_clamp": None, "reduce": "seq-mean-token-mean", "sequence_count": "drawn", "kl_estimator": "k1",
            "kl_log_ratio_clamp": None, "entropy_reduce": None,
        },
        follow=lambda known: {"correction_min": 0.0, "correction_max": 2.0} if known["correction"] == "icepop" else {},
        estimators={
            "grpo": {"eps": 1e-6}, "reinforce_pp": {"whiten": "none"}, "reinforce_pp_baseline": {"whiten": "none"},
        },
    ),
    # ROLL, roll/pipeline/rlvr/actor_pg_worker.py and actor_worker.py
    "roll": Preset(
        losses={
            "grpo": {}, "dapo": {"reduce": "token-mean"}, "gspo": {}, "reinforce": {},
            "cispo": {"ratio_min": 0.9, "ratio_max": 1.1}, "topr": {}, "kimi15": {}, "dual_clip": {"dual_clip": 1.4},
            "grpo_entropy": {},
        },
        every={
            "log_ratio_clamp": None, "reduce": "seq-mean-token-mean", "kl_value_clamp": 10.0, "entropy_reduce": None,
        },
        estimators={"grpo": {"eps": 1e-6}, "lite_ppo": {"eps": 1e-6}},
    ),
}  # fmt: skip


def find(name: str) -> Preset:
    """The preset. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"loss.preset {name!r} is unknown{nearest(name, PRESETS)}; it is one of {', '.join(PRESETS)}")
    return PRESETS[name]


def changes(preset: str, name: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> Changes:
    """What ``preset`` changes in the loss ``name`` whose options are ``known`` without it, where a user has not ``given`` them.

    Raises UserError if the framework has no such loss.
    """
    found = find(preset)
    if name not in found.losses:
        instead = f"; {found.refused[name]}" if name in found.refused else ""
        raise UserError(f"loss.preset {preset}: {preset} has no loss {name}{instead}; it has {', '.join(found.losses)}")
    wanted = found.every | found.losses[name]
    if found.follow is not None:
        wanted = wanted | found.follow({**known, **wanted, **given})
    return {key: value for key, value in wanted.items() if key in known}
