"""The axes of a policy loss as records: each option with its default, read by the function of its axis."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from jaxreason.losses.inputs import Fraction

Ratio = Literal["token", "sequence_mean", "sequence_sum", "gspo_token"]
Behaviour = Literal["old", "sampler", "policy"]
Reduce = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "token-sum", "token-sum/const", "prompt-mean"]
KlEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+", "k1_unbiased", "k2_unbiased", "k3_unbiased"]
Correction = Literal["none", "tis", "tis_sequence", "tis_geometric", "icepop", "mis", "seq_mask_tis", "geo_rs"]
Reject = Literal[
    "none", "token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3", "seq_mean_k1", "seq_mean_k2",
    "seq_mean_k3", "seq_max_k2", "seq_max_k3", "seq_tv",
]  # fmt: skip
LOG_RATIO_CLAMP = 20.0  # e^20 is beyond any ratio that teaches, and its square is far from float32's end


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatioAxis:
    """``ratio``, ``log_ratio_clamp``: see ``jaxreason.losses.ratio``. ``behaviour``: whose log-probs it divides by: ``old``
    (recomputed by the trainer), ``sampler`` (as the sampler reported; verl's "bypass") or ``policy`` (its own, detached:
    w is 1 and only its gradient is left)."""

    ratio: Ratio = "token"
    log_ratio_clamp: float | None = LOG_RATIO_CLAMP
    behaviour: Behaviour = "old"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReduceAxis:
    """See ``jaxreason.losses.reduce``. ``sequence_count``: whether sequences without a supervised token (truncated and masked
    ones) are in the number of sequences that a mean divides by: ``trained`` (no) or ``drawn`` (yes, TRL)."""

    reduce: Reduce = "seq-mean-token-mean"
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    sequence_count: Literal["trained", "drawn"] = "trained"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KlAxis:
    """KL in the loss, see ``jaxreason.losses.kl``; neither the keep masks nor rho touch it.

    ``kl_ratio``: the ratio that the ``_unbiased`` estimators multiply by: each token's own (``token``, DeepSeek-V3.2), the one
    of ``ratio`` (``surrogate``, TRL), pi / sg pi (``policy``: value 1, NeMo-RL), or pi / pi_sampler (``sampler``).
    ``kl_reduce``: its aggregation; None: that of ``reduce``.
    """

    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    kl_ratio: Literal["token", "surrogate", "policy", "sampler"] = "token"
    kl_reduce: Reduce | None = None
    kl_log_ratio_clamp: float | None = LOG_RATIO_CLAMP
    kl_value_clamp: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorrectionAxis:
    """rho, see ``jaxreason.losses.sampler_correction``; bounds of None: its defaults. It multiplies the surrogate, except
    where the surrogate takes it into its own ratio (vespo, gmpo). ``correction_normalize``: ``step`` divides rho by its mean over
    the step (verl's ``rollout_is_batch_normalize``), over tokens or, of a rho that a sequence shares, over sequences.

    ``reject``, ``reject_min``, ``reject_max``: drop the surrogate where sampler and trainer differ too much, see
    ``jaxreason.losses.sampler_correction.rejected``.

    ``off_policy_threshold``, ``off_policy_behaviour``: drop sequences with A < 0 that drifted further than this from ``old``
    or ``sampler``, nats per token (OPSM).
    """

    correction: Correction = "none"
    correction_min: float | None = None
    correction_max: float | None = None
    correction_normalize: Literal["none", "step"] = "none"
    reject: Reject = "none"
    reject_min: Annotated[float, Field(gt=0)] | None = None
    reject_max: Annotated[float, Field(gt=0)] | None = None
    off_policy_threshold: float | None = None
    off_policy_behaviour: Literal["old", "sampler"] = "old"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyAxis:
    """``top_entropy``: keep the surrogate of only this fraction of the step's tokens, those of highest entropy (2506.01939).

    ``entropy_coef``: coefficient of the entropy bonus; ``inputs.entropy_coef`` replaces it if given. ``entropy_over``: the
    tokens whose mean entropy that is: ``all``, or those that ``top_entropy`` keeps, where it is set (``top``, TRL).
    ``entropy_reduce``: its aggregation; None: that of ``reduce`` (verl).
    """

    top_entropy: Fraction | None = None
    entropy_coef: float = 0.0
    entropy_over: Literal["all", "top"] = "all"
    entropy_reduce: Reduce | None = "token-mean"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillAxis:
    """``distill_coef``: coefficient of the divergence from a teacher's distribution (``inputs.teacher_divergence``), a term of
    its own: no ratio, mask or correction touches it, apart from ``distill_ratio_max``: it is multiplied by sg min(w, this),
    w = pi / pi_old of the token (SDPO, 2601.20802; TRL: 2). ``distill_reduce``: its aggregation; None: that of ``reduce``."""

    distill_coef: float = 0.0
    distill_ratio_max: Annotated[float, Field(gt=0)] | None = None
    distill_reduce: Reduce | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImitationAxis:
    """``positive_nll_coef``: coefficient of the mean of -log pi over the tokens of the step's samples with a positive reward
    (VAPO, 2504.05118, where it is 0.1). The extra ``positive`` says which these are: the step's tokens / the tokens of those
    samples on them, 0 elsewhere."""

    positive_nll_coef: float = 0.0


@dataclasses.dataclass(frozen=True)
class Axes:
    """A point in the space, the surrogate left out."""

    ratio: RatioAxis
    reduce: ReduceAxis
    kl: KlAxis
    correction: CorrectionAxis
    entropy: EntropyAxis
    distill: DistillAxis
    imitation: ImitationAxis

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Axes":
        """From flat ``options`` by name; those of no axis are left out."""
        return cls(
            ratio=_record(RatioAxis, options),
            reduce=_record(ReduceAxis, options),
            kl=_record(KlAxis, options),
            correction=_record(CorrectionAxis, options),
            entropy=_record(EntropyAxis, options),
            distill=_record(DistillAxis, options),
            imitation=_record(ImitationAxis, options),
        )


RECORDS = (RatioAxis, ReduceAxis, KlAxis, CorrectionAxis, EntropyAxis, DistillAxis, ImitationAxis)
AnyAxis = TypeVar("AnyAxis", RatioAxis, ReduceAxis, KlAxis, CorrectionAxis, EntropyAxis, DistillAxis, ImitationAxis)


def _record(kind: type[AnyAxis], options: Mapping[str, Any]) -> AnyAxis:
    return kind(**{field.name: options[field.name] for field in dataclasses.fields(kind) if field.name in options})
