"""The named policy losses: each a surrogate and the options in which it differs, as data."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import Array

from jaxreason.errors import UserError
from jaxreason.losses import surrogate as s
from jaxreason.losses.inputs import Fraction, PolicyInputs, clean
from jaxreason.losses.policy import policy_loss, top_entropy_rule
from jaxreason.losses.select import covariance, largest_covariance, random_in_band

Options = dict[str, inspect.Parameter]


@dataclass(frozen=True)
class Variant:
    """A point in the space. ``advantage`` names the estimator of ``jaxreason.losses.advantage`` that belongs to it."""

    surrogate: Callable[..., s.Surrogate]
    options: Mapping[str, Any] = field(default_factory=dict)
    advantage: str = "grpo"
    select: Callable[..., Callable[..., Array]] | None = None  # options of the rule -> rule(inputs, key)
    kl_placement: str = "loss"  # where the paper has its KL: ``loss`` or ``reward``

    def declared(self) -> Options:
        """Every option of the variant, with its default and its type."""
        return options_of(policy_loss, self.surrogate, self.select, changed=self.options)


def options_of(*functions: Callable | None, changed: Mapping[str, Any]) -> Options:
    """The keyword-only parameters with a default of several functions; the defaults that are ``changed``."""
    found: Options = {}
    for function in functions:
        if function is not None:
            parameters = inspect.signature(function).parameters.values()
            found |= {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return {name: p.replace(default=changed.get(name, p.default)) for name, p in found.items()}


def _clip_cov_rule(*, cov_fraction: Fraction = 2e-4, cov_low: float = 1.0, cov_high: float = 5.0) -> Callable[..., Array]:
    def rule(inputs: PolicyInputs, key: Array | None = None) -> Array:
        cov = covariance(inputs.advantages, inputs.logp, inputs.mask)
        # The training loop passes a key of the step; without one the batch is a test or a single evaluation.
        return random_in_band(
            cov, inputs.mask, cov_low, cov_high, cov_fraction, jax.random.key(0) if key is None else key
        )

    return rule


def _kl_cov_rule(*, cov_fraction: Fraction = 2e-4) -> Callable[..., Array]:
    def rule(inputs: PolicyInputs, key: Array | None = None) -> Array:
        del key
        return largest_covariance(covariance(inputs.advantages, inputs.logp, inputs.mask), inputs.mask, cov_fraction)

    return rule


_GSPO = {"clip_low": 3e-4, "clip_high": 4e-4}

VARIANTS: dict[str, Variant] = {
    # 2402.03300
    "grpo": Variant(s.ppo_clip),
    # -w A, the loss of on-policy distillation
    "importance_sampling": Variant(s.importance, {"reduce": "token-mean"}),
    # 2503.20783; the constant is the paper's generation budget
    "dr_grpo": Variant(s.ppo_clip, {"reduce": "token-sum/const", "max_completion_tokens": 3000}, "center"),
    # 2503.14476
    "dapo": Variant(s.ppo_clip, {"reduce": "token-mean", "clip_high": 0.28}),
    # TRL's name for GRPO averaged over tokens with a symmetric clip
    "bnpo": Variant(s.ppo_clip, {"reduce": "token-mean"}),
    # 2507.18071
    "gspo": Variant(s.ppo_clip, {"ratio": "sequence_mean", **_GSPO}),
    "gspo_token": Variant(s.ppo_clip, {"ratio": "gspo_token", **_GSPO}),
    # 2506.13585
    "cispo": Variant(s.cispo, {"reduce": "token-mean"}),
    # 2507.20673
    "gmpo": Variant(s.gmpo),
    # 2402.14740
    "rloo": Variant(s.reinforce, {"reduce": "seq-mean-token-sum"}, "rloo", kl_placement="reward"),
    # Williams 1992
    "reinforce": Variant(s.reinforce, {"reduce": "token-mean"}, "raw"),
    # 2501.03262
    "reinforce_pp": Variant(s.ppo_clip, {"reduce": "token-mean"}, "reinforce_pp", kl_placement="reward"),
    "reinforce_pp_baseline": Variant(s.ppo_clip, {"reduce": "token-mean"}, "reinforce_pp_baseline"),
    # 2511.20347
    "sapo": Variant(s.sapo),
    # 2508.02833 v2 and v5
    "tic_grpo": Variant(s.ppo_clip, {"ratio": "sequence_sum"}),
    "tic_grpo_lc": Variant(s.upper_cap, {"ratio": "sequence_sum"}, "tic_lc"),
    # 2504.02546
    "gpg": Variant(s.reinforce, {"reduce": "token-mean"}, "gpg"),
    # 2508.08221
    "lite_ppo": Variant(s.ppo_clip, {"reduce": "token-mean"}, "lite_ppo"),
    # 2602.05261
    "luspo": Variant(
        s.ppo_clip, {"ratio": "sequence_mean", "reduce": "seq-mean-token-sum", "clip_low": 2e-3, "clip_high": 2.5e-3}
    ),
    # 2602.10693
    "vespo": Variant(s.vespo, {"reduce": "token-mean"}),
    # 2602.02710
    "maxrl": Variant(s.ppo_clip, advantage="maxrl"),
    # DPPO-TV as in prime-rl
    "dppo": Variant(s.dppo, {"reduce": "token-mean"}, "center"),
    # 2505.07291 and 1912.09729
    "two_sided": Variant(s.ppo_clip, {"ratio_cap": 4.0}),
    "dual_clip": Variant(s.ppo_clip, {"dual_clip": 3.0}),
    # 2505.22617
    "clip_cov": Variant(s.clip_cov, {"reduce": "token-mean"}, select=_clip_cov_rule),
    "kl_cov": Variant(s.kl_cov, {"reduce": "token-mean"}, select=_kl_cov_rule),
    # 2506.01939
    "top_entropy": Variant(s.ppo_clip, {"reduce": "token-mean", "clip_high": 0.28, "top_entropy": 0.2}),
    # DeepSeek-V3.2
    "opsm": Variant(s.ppo_clip, {"off_policy_threshold": 0.5}),
    # entropy bonus on GRPO
    "grpo_entropy": Variant(s.ppo_clip, {"entropy_coef": 0.001}),
    # 2601.05242: one advantage from several rewards
    "gdpo": Variant(s.ppo_clip, advantage="gdpo"),
}

# Conventions of other frameworks: options set where a variant has them.
_TRL = {
    "log_ratio_clamp": None,
    "kl_log_ratio_clamp": None,
    "kl_estimator": "k3_unbiased",
    "kl_ratio": "surrogate",
    "entropy_over": "top",
    "off_policy_behaviour": "sampler",
}
# TRL's one pair of bounds for every mode; 0 and not None, which would be the correction's own bound.
_TRL_CORRECTION = {"correction_min": 0.0, "correction_max": 3.0}
_VERL = {"log_ratio_clamp": 20.0, "kl_log_ratio_clamp": 20.0, "kl_value_clamp": 10.0}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "trl": {
        "*": _TRL,
        "cispo": {"ratio_min": None, "ratio_max": 5.0},
    },
    "verl": {
        "*": _VERL | {"dual_clip": 3.0},
        "cispo": {"ratio_min": 0.8, "ratio_max": 1.2},
        "gspo": {"ratio": "gspo_token", "dual_clip": None},
    },
    "nemo": {
        "*": {},
        "cispo": {"ratio_min": 0.8, "ratio_max": 1.2},
    },
}


def preset_options(preset: str, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """What ``preset`` changes in the variant ``name`` whose options would be ``known`` without it."""
    table = PRESETS[preset]
    wanted = table["*"] | table.get(name, {})
    if preset == "trl" and known["correction"] not in ("none", "geo_rs"):  # geo_rs is not TRL's
        wanted = wanted | _TRL_CORRECTION
    return {key: value for key, value in wanted.items() if key in known}


def step_rule(variant: Variant, options: Mapping[str, Any]) -> Callable[..., Array] | None:
    """The step-wide rule of a variant with these options, on cleaned inputs. Raises UserError if two would be
    needed."""
    own = None
    if variant.select is not None:
        own = variant.select(**{key: options[key] for key in options_of(variant.select, changed={})})
    if options["top_entropy"] is None:
        return own
    if own is not None:
        raise UserError("top_entropy and a covariance loss both pick tokens; choose one of them")
    return top_entropy_rule(options["top_entropy"])


def on_raw(rule: Callable[..., Array]) -> Callable[..., Array]:
    """The rule for callers: masked positions may hold anything."""

    def select(inputs: PolicyInputs, key: Array | None = None) -> Array:
        return rule(clean(inputs)[0], key)

    return select
