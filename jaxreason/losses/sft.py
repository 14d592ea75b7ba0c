"""Supervised losses: weight x negative log-likelihood (+ regularisers), per supervised token.

Weights are detached, so the gradient is weight x grad NLL. p is the probability of the target token.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxreason.errors import UserError
from jaxreason.losses import distill as divergences
from jaxreason.losses.axes import LOG_RATIO_CLAMP
from jaxreason.losses.inputs import Fraction, SftInputs, clean, need, totals_of
from jaxreason.losses.segments import Sequences, sequence_counts, sequence_mean

SftReduce = Literal["token-mean", "seq-mean-token-mean", "seq-sqrt"]


def sft_loss(
    inputs: SftInputs,
    *,
    per_token: Callable[..., Array],
    reduce: SftReduce = "token-mean",
    z_loss_coef: float = 0.0,
    **options: Any,
) -> tuple[Array, dict[str, Array]]:
    """sum_t token_weights_t (per_token_t + z_loss_coef logsumexp_t^2) * reduce_t.

    Args:
      inputs: arrays [B, T]; masked positions may hold anything.
      per_token: one of the functions below; takes ``options``.
      reduce: ``token-mean`` (1 / tokens of the step), ``seq-mean-token-mean`` (1 / (n_i sequences)), or ``seq-sqrt``
        (1 / (sqrt(n_i) sequences)), with n_i the supervised tokens of the sequence. ``token_weights`` do not change the
        denominators.
      z_loss_coef: weight of logsumexp^2, which keeps the logits from drifting (PaLM, 2204.02311).

    Returns:
      The loss and metrics that add over microbatches; ``nll`` is the plain one whatever the loss.
    """
    inputs, sequences = clean(inputs)
    totals = totals_of(inputs, sequences)
    loss = per_token(inputs, sequences, **options)
    if z_loss_coef != 0:
        loss = loss + z_loss_coef * jnp.square(need(inputs, "logsumexp", f"z_loss_coef {z_loss_coef}"))
    if inputs.token_weights is not None:
        loss = loss * inputs.token_weights
    if reduce == "token-mean":
        weights = 1.0 / jnp.maximum(totals.tokens, 1.0)
    elif reduce in get_args(SftReduce):
        counts = jnp.maximum(sequence_counts(sequences), 1.0)
        counts = jnp.sqrt(counts) if reduce == "seq-sqrt" else counts
        weights = 1.0 / (counts * jnp.maximum(totals.sequences, 1.0))
    else:
        raise UserError(f"reduce is {reduce!r}; it is one of {', '.join(get_args(SftReduce))}")
    value = jnp.sum(jnp.where(sequences.live, weights * loss, 0.0))

    tokens = jnp.maximum(totals.tokens, 1.0)
    metrics = {"nll": -jnp.sum(inputs.logp) / tokens}
    if inputs.entropy is not None:
        metrics["entropy"] = jnp.sum(inputs.entropy) / tokens
    return value, {key: stop_gradient(metric) for key, metric in metrics.items()}


def nll(x: SftInputs, sequences: Sequences) -> Array:
    """-log p."""
    return -x.logp


def power(x: SftInputs, sequences: Sequences, *, a: float = 0.0, b: float = 0.0) -> Array:
    """-sg[p^a (1 - p)^b] log p: (0, 0) NLL, (1, 0) DFT (2508.05629), (0, gamma) focal (1708.02002), (1, 1) CHORD-phi
    (2508.11408)."""
    logp = stop_gradient(jnp.minimum(x.logp, 0.0))
    weight = jnp.ones(logp.shape, jnp.float32) if a == 0 else jnp.exp(a * logp)
    if b != 0:
        weight = weight * jnp.power(-jnp.expm1(logp), b)
    # A target of probability 0: p^a log p tends to 0 for a > 0, where 0 * inf would be NaN.
    return -weight * jnp.where(weight > 0, x.logp, 0.0)


def label_smoothing(x: SftInputs, sequences: Sequences, *, epsilon: Fraction = 0.1) -> Array:
    """-(1 - epsilon) log p - epsilon mean_v log p_v (1512.00567)."""
    return -(1.0 - epsilon) * x.logp - epsilon * need(x, "mean_logp", "label_smoothing")


def asft(x: SftInputs, sequences: Sequences, *, kl_coef: float = 0.05) -> Array:
    """DFT + kl_coef KL(base || policy) over the full vocabulary (2509.23753)."""
    return power(x, sequences, a=1.0) + kl_coef * need(x, "ref_kl", "asft")


def sft_kl(x: SftInputs, sequences: Sequences, *, kl_coef: float = 0.05) -> Array:
    """NLL + kl_coef KL(base || policy) over the full vocabulary."""
    return -x.logp + kl_coef * need(x, "ref_kl", "sft_kl")


def iw_sft(
    x: SftInputs,
    sequences: Sequences,
    *,
    level: Literal["sequence", "token"] = "sequence",
    tau: float = 1.0,
    weight_min: float | None = None,
    weight_max: float | None = None,
) -> Array:
    """-sg[w] log p, w = clip(exp(tau mean_t(log p - log p_ref)), 0, 16) of the sequence (2507.12856).

    ``level="token"``: w_t = clip(exp(tau (log p_t - log p_ref,t)), 0.2, 1.8). ``weight_min``, ``weight_max`` of None:
    these.
    """
    gap = stop_gradient(x.logp - need(x, "ref_logp", "iw_sft"))
    if level == "sequence":
        gap = sequence_mean(gap, sequences)
    low, high = (0.0, 16.0) if level == "sequence" else (0.2, 1.8)
    low, high = (low if weight_min is None else weight_min), (high if weight_max is None else weight_max)
    # exp of a clipped exponent: e^60 is beyond any bound and below float32's end.
    return -jnp.clip(jnp.exp(jnp.clip(tau * gap, -60.0, 60.0)), low, high) * x.logp


def eaft(x: SftInputs, sequences: Sequences, *, alpha: float = 1.0, scale: float = 3.0) -> Array:
    """-sg[(H / scale)^alpha] log p with H the entropy of the top 20 probabilities (2601.02151): confident conflicts
    count less. ``scale`` is close to log 20, the largest such entropy."""
    weight = jnp.power(stop_gradient(jnp.maximum(need(x, "topk_entropy", "eaft"), 0.0)) / scale, alpha)
    return -weight * x.logp


def rho1(x: SftInputs, sequences: Sequences, *, threshold: float = 0.0) -> Array:
    """-log p on tokens whose excess loss over the reference, log p_ref - log p, is above ``threshold`` nats, 0
    elsewhere.

    Rho-1 (2404.07965) keeps the top k% of the batch; a quantile of a microbatch is not that of the step, so the
    threshold is given instead.
    """
    excess = stop_gradient(need(x, "ref_logp", "rho1") - x.logp)
    return jnp.where(excess > threshold, -x.logp, 0.0)


def psft(x: SftInputs, sequences: Sequences, *, clip_high: float = 0.28) -> Array:
    """-min(w, 1 + clip_high), w = p / p_ref: proximal SFT, PPO's clipped objective with A = 1 (2508.17784). A token whose
    probability rose that far above the reference's has no gradient. The reference is the model as it was up to
    ``reference.refresh_every`` steps ago."""
    log_w = x.logp - need(x, "ref_logp", "psft")
    return -jnp.minimum(jnp.exp(jnp.clip(log_w, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)), 1.0 + clip_high)


def distill(x: SftInputs, sequences: Sequences, *, nll_coef: float = 0.0) -> Array:
    """D(student, teacher) - nll_coef log p, D being the loss's divergence over the full vocabulary (2306.13649)."""
    divergence = need(x, "teacher_divergence", "a distillation loss")
    return divergence - nll_coef * x.logp if nll_coef else divergence


def neftune_noise(keys: Array, sequences: Sequences, width: int, alpha: float) -> Array:
    """[B, T, width] U(-1, 1) alpha / sqrt(L width), to be added to embeddings in training (2310.05914).

    L is the number of tokens of the position's own sequence, so packing does not change the scale. ``keys`` [B], one a
    row. 0 at padding.
    """
    length, columns = jnp.maximum(sequence_counts(sequences), 1.0), sequences.live.shape[1]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (columns, width), jnp.float32, -1.0, 1.0))(keys)
    return jnp.where(sequences.live[..., None], noise * (alpha / jnp.sqrt(length * width))[..., None], 0.0)


# name -> (per-token function, options in which it differs, inputs it reads whatever its options)
SFT_LOSSES: dict[str, tuple[Callable[..., Array], dict[str, Any], frozenset[str]]] = {
    "nll": (nll, {}, frozenset()),
    "power": (power, {}, frozenset()),
    "dft": (power, {"a": 1.0}, frozenset()),
    "focal": (power, {"b": 2.0}, frozenset()),
    "chord_phi": (power, {"a": 1.0, "b": 1.0}, frozenset()),
    "label_smoothing": (label_smoothing, {}, frozenset({"mean_logp"})),
    "z_loss": (nll, {"z_loss_coef": 1e-4}, frozenset()),
    "asft": (asft, {}, frozenset({"ref_kl"})),
    "sft_kl": (sft_kl, {}, frozenset({"ref_kl"})),
    "iw_sft": (iw_sft, {}, frozenset({"ref_logp"})),
    "eaft": (eaft, {}, frozenset({"topk_entropy"})),
    "rho1": (rho1, {}, frozenset({"ref_logp"})),
    "psft": (psft, {}, frozenset({"ref_logp"})),
    **{name: (distill, {}, frozenset({"teacher_divergence"})) for name in divergences.DIVERGENCES},
}
