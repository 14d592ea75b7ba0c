"""The named policy losses: each a surrogate and the options in which it differs, as data."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxreason.errors import UserError
from jaxreason.losses import surrogate as s
from jaxreason.losses.axes import LOG_RATIO_CLAMP, RECORDS, Axes
from jaxreason.losses.inputs import Fraction, PolicyInputs, clean, need, totals_of
from jaxreason.losses.policy import normalize_rule, top_entropy_rule
from jaxreason.losses.ratio import log_ratio
from jaxreason.losses.reduce import group_sums
from jaxreason.losses.segments import sequence_counts, sequences_of
from jaxreason.losses.select import covariance, largest_covariance, random_in_band

Options = dict[str, inspect.Parameter]


@dataclass(frozen=True)
class Variant:
    """A point in the space. ``advantage`` names the estimator of ``jaxreason.losses.advantage`` that belongs to it."""

    surrogate: Callable[..., s.Surrogate]
    options: Mapping[str, Any] = field(default_factory=dict)
    advantage: str = "grpo"
    select: Callable[..., Callable[..., Array]] | None = None  # options of the rule -> rule(inputs, key)
    reselects: bool = False  # the rule is of the current policy: it runs before every update, not once a rollout
    kl_placement: str = "loss"  # where the paper has its KL: ``loss`` or ``reward``
    extras: frozenset[str] = frozenset()  # inputs of the surrogate beside those of every policy loss

    def bound(self, options: Mapping[str, Any]) -> Callable[[s.Tokens], s.Surrogate]:
        """The surrogate with its own of ``options``."""
        return functools.partial(self.surrogate, **{name: options[name] for name in options_of(self.surrogate, changed={})})

    def declared(self) -> Options:
        """Every option of the variant, with its default and its type."""
        return options_of(*RECORDS, self.surrogate, self.select, changed=self.options)


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


def _real_rule(*, real_tau: float = 0.5) -> Callable[..., Array]:
    """Of REAL, at the current policy: sequences / prompts / (1 + the sum of exponentials of the position's side of its prompt);
    0 where a prompt has completions of one side only."""

    def rule(inputs: PolicyInputs, key: Array | None = None) -> Array:
        del key
        group_ids, sequences = need(inputs, "group_ids", "real"), sequences_of(inputs.mask > 0, inputs.sequence_ids)
        totals = totals_of(inputs, sequences)
        once = jnp.where(sequences.live, 1.0 / jnp.maximum(sequence_counts(sequences), 1.0), 0.0)  # sums to 1 in a sequence
        right = inputs.advantages > 0
        mean = log_ratio(inputs.logp, inputs.old_logp, "sequence_mean", LOG_RATIO_CLAMP, sequences)
        terms = once * jnp.exp(s.real_exponent(mean, inputs.advantages, real_tau))
        up, down = (group_sums(jnp.where(side, terms, 0.0), group_ids) for side in (right, ~right))
        some, others = (group_sums(jnp.where(side, once, 0.0), group_ids) > 0.5 for side in (right, ~right))
        scale = totals.sequences / jnp.maximum(totals.prompts, 1.0)
        return jnp.where(sequences.live & some & others, scale / (1.0 + jnp.where(right, up, down)), 0.0)

    return rule


_GSPO = {"clip_low": 3e-4, "clip_high": 4e-4}

VARIANTS: dict[str, Variant] = {
    # 2402.03300
    "grpo": Variant(s.ppo_clip),
    # -w A, the loss of on-policy distillation
    "importance_sampling": Variant(s.importance, {"reduce": "token-mean"}),
    # 2306.13649 on the policy's own samples: distill_coef times the divergence from a teacher's distribution, and no reward
    "distill": Variant(s.nothing, {"reduce": "token-mean", "distill_coef": 1.0}, "zero"),
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
    # 2602.04879: prime-rl's form with l^2, the paper's two, and prime-rl's symmetric region
    "dppo": Variant(s.dppo, {"reduce": "token-mean"}, "center"),
    "dppo_tv": Variant(s.dppo, {"reduce": "token-mean", "log_ratio_coef": 0.0}, "center"),
    "dppo_kl": Variant(
        s.dppo,
        {"reduce": "token-mean", "divergence": "kl", "max_rise": 0.05, "max_fall": 0.05, "log_ratio_coef": 0.0},
        "center",
    ),
    "ipo": Variant(
        s.dppo,
        {"reduce": "token-mean", "region": "symmetric", "max_rise": 0.1, "max_fall": 0.1, "behaviour": "sampler"},
        "center",
    ),
    # 2503.14286
    "topr": Variant(s.topr, {"reduce": "seq-mean-token-sum"}, "raw"),
    # 2405.19107, 2501.12599
    "dro": Variant(s.dro, {"reduce": "token-mean"}, "center"),
    "kimi15": Variant(s.dro, advantage="center"),
    # 2505.07291 and 1912.09729
    "two_sided": Variant(s.ppo_clip, {"ratio_cap": 4.0}),
    "dual_clip": Variant(s.ppo_clip, {"dual_clip": 3.0}),
    # 2510.06062
    "aspo": Variant(s.aspo, {"reduce": "token-mean"}),
    # 2603.19835
    "fipo": Variant(s.fipo, {"reduce": "token-mean"}),
    # 2602.05630
    "real": Variant(s.real, {"ratio": "sequence_mean"}, select=_real_rule, reselects=True),
    # 2504.14945 and 2508.11408: with the row's own answer in each group (``rollout.expert``)
    "luffy": Variant(
        s.luffy, {"reduce": "token-sum/const", "max_completion_tokens": 8192}, "luffy", extras=frozenset({"expert"})
    ),
    "chord": Variant(s.chord, {"reduce": "token-mean"}, extras=frozenset({"expert", "sampled"})),
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

def step_rule(variant: Variant, options: Mapping[str, Any]) -> Callable[..., Array] | None:
    """The step-wide rule of a variant with these options, on cleaned inputs. Raises UserError if two would be
    needed."""
    rules = {}
    if variant.select is not None:
        rules["the loss itself"] = variant.select(**{key: options[key] for key in options_of(variant.select, changed={})})
    if options["top_entropy"] is not None:
        rules["top_entropy"] = top_entropy_rule(options["top_entropy"])
    if options["correction_normalize"] != "none":
        rules["correction_normalize"] = normalize_rule(Axes.of(options).correction)
    if len(rules) > 1:
        raise UserError(f"{' and '.join(rules)} each need a rule over the whole step, and there is one; choose one of them")
    return next(iter(rules.values()), None)


def on_raw(rule: Callable[..., Array]) -> Callable[..., Array]:
    """The rule for callers: masked positions may hold anything."""

    def select(inputs: PolicyInputs, key: Array | None = None) -> Array:
        return rule(clean(inputs)[0], key)

    return select
