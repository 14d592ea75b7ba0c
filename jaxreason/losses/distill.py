"""Divergences between a student's and a teacher's next-token distributions, on full logits [..., V].

Pure functions of small logits. Training hands them chunks of tokens at a time (``model.chunked``), so that a
``[B, T, V]`` array never exists. ``temperature`` divides both models' logits and scales nothing else (GKD, 2306.13649).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient
from pydantic import Field

from jaxreason.errors import UserError
from jaxreason.losses.inputs import Fraction

Temperature = Annotated[float, Field(gt=0)]
Divergence = Callable[[Array, Array], Array]  # of the student's logits and the teacher's, [..., V] -> [...]


def forward_kl(student_logits: Array, teacher_logits: Array, *, temperature: Temperature = 1.0) -> Array:
    """[...] KL(teacher || student) = sum_v p_T log(p_T / p_S): mass-covering. Infinite where the student cannot emit what the
    teacher can."""
    return _kl(_log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature))


def reverse_kl(student_logits: Array, teacher_logits: Array, *, temperature: Temperature = 1.0) -> Array:
    """[...] KL(student || teacher) = sum_v p_S log(p_S / p_T): mode-seeking. Infinite where the teacher cannot emit what the
    student can."""
    return _kl(_log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature))


def generalized_jsd(
    student_logits: Array, teacher_logits: Array, *, beta: Fraction = 0.5, temperature: Temperature = 1.0
) -> Array:
    """[...] beta KL(p_T || M) + (1 - beta) KL(p_S || M) with M = beta p_T + (1 - beta) p_S. GKD (2306.13649).

    beta = 0 is the forward and beta = 1 the reverse KL: there the formula itself is 0, and only its quotient by beta
    (or 1 - beta) tends to them. Raises UserError for beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise UserError(f"beta is {beta}; it lies between 0 (forward KL) and 1 (reverse KL)")
    if beta == 0:
        return forward_kl(student_logits, teacher_logits, temperature=temperature)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    mixture = _mixture(teacher, student, beta)
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def skew_forward_kl(
    student_logits: Array, teacher_logits: Array, *, alpha: Fraction = 0.1, temperature: Temperature = 1.0
) -> Array:
    """[...] KL(p_T || alpha p_T + (1 - alpha) p_S): bounded by -log alpha where the student cannot emit what the teacher can.
    DistiLLM (2402.03898); alpha = 0 is the forward KL."""
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    return _kl(teacher, _mixture(teacher, student, alpha))


def skew_reverse_kl(
    student_logits: Array, teacher_logits: Array, *, alpha: Fraction = 0.1, temperature: Temperature = 1.0
) -> Array:
    """[...] KL(p_S || (1 - alpha) p_T + alpha p_S): bounded by -log alpha. DistiLLM (2402.03898); alpha = 0 is the reverse
    KL."""
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    return _kl(student, _mixture(student, teacher, alpha))


def adaptive_kl(
    student_logits: Array, teacher_logits: Array, *, head: Fraction = 0.5, temperature: Temperature = 1.0
) -> Array:
    """[...] (g_head forward_kl + g_tail reverse_kl) / (g_head + g_tail), the gaps g = sum |p_T - p_S| detached: the forward KL
    where the models differ most in what the teacher finds likely. AKL (2404.02657).

    The head holds the teacher's most likely tokens whose probabilities add up to at most ``head``, and the most likely one in
    any case; the tail holds the others.
    """
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    p_t, order = jax.lax.top_k(jnp.exp(teacher), teacher.shape[-1])
    gap = stop_gradient(jnp.abs(p_t - jnp.take_along_axis(jnp.exp(student), order, axis=-1)))
    tail = (jnp.cumsum(p_t, axis=-1) > head).at[..., 0].set(False)
    gaps = jnp.sum(gap, axis=-1)
    # Equal distributions have no gap, and both divergences are 0 there.
    share = jnp.sum(jnp.where(tail, 0.0, gap), axis=-1) / jnp.where(gaps > 0, gaps, 1.0)
    return share * _kl(teacher, student) + (1.0 - share) * _kl(student, teacher)


DIVERGENCES: dict[str, Callable[..., Array]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": generalized_jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
}


def restricted(
    student_logits: Array,
    teacher_logits: Array,
    *,
    temperature: Temperature = 1.0,
    top_k: Annotated[int, Field(ge=0)] = 0,
    top_from: Literal["teacher", "student"] = "teacher",
    tail: bool = True,
) -> tuple[Array, Array]:
    """Both models' log-probs [..., top_k + 1] of the ``top_k`` likeliest tokens of one of them (``top_from``) and, last, of all
    other tokens together; without ``tail`` [..., top_k], made to sum to 1. ``top_k`` 0: of all tokens.

    A divergence of distributions with a tail is never above that of the whole ones.
    """
    student, teacher = _log_softmax(student_logits, temperature), _log_softmax(teacher_logits, temperature)
    if top_k == 0:
        return student, teacher
    ranked = teacher if top_from == "teacher" else student
    _, chosen = jax.lax.top_k(stop_gradient(ranked), min(top_k, ranked.shape[-1]))
    pair = [jnp.take_along_axis(x, chosen, axis=-1) for x in (student, teacher)]
    first, second = (_with_tail(x) if tail else jax.nn.log_softmax(x, axis=-1) for x in pair)
    return first, second


def declared(name: str) -> dict[str, inspect.Parameter]:
    """The options of a divergence: its own and those of :func:`restricted`."""
    found: dict[str, inspect.Parameter] = {}
    for function in (restricted, DIVERGENCES[name]):
        parameters = inspect.signature(function).parameters.values()
        found |= {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    return found


def bound(name: str, **options: Any) -> Divergence:
    """The divergence ``name`` with its options, on logits [..., V] or, with ``top_k``, on what :func:`restricted` leaves."""
    support: dict[str, Any] = {key: options.pop(key) for key in ("top_k", "top_from", "tail") if key in options}
    if not support.get("top_k"):
        return functools.partial(DIVERGENCES[name], **options)
    support["temperature"] = options.pop("temperature", 1.0)

    def divergence(student_logits: Array, teacher_logits: Array) -> Array:
        return DIVERGENCES[name](*restricted(student_logits, teacher_logits, **support), **options)

    return divergence


def topk_entropy(logits: Array, k: int = 20) -> Array:
    """[...] entropy, nats, of the k largest probabilities made to sum to 1 (EAFT, 2601.02151)."""
    top = _log_softmax(jax.lax.top_k(logits, min(k, logits.shape[-1]))[0], 1.0)
    return -jnp.sum(jnp.exp(top) * top, axis=-1)


def _mixture(first: Array, second: Array, share: float) -> Array:
    """log(share e^first + (1 - share) e^second)."""
    if share in (0.0, 1.0):
        return first if share else second
    # Where both are 0 the gradient would be NaN: both stand in with the same finite number, which nothing weighs.
    neither = (first == -jnp.inf) & (second == -jnp.inf)
    low = jnp.float32(jnp.finfo(jnp.float32).min / 4)
    first, second = (jnp.where(neither, low, x) for x in (first, second))
    return jnp.logaddexp(first + jnp.log(share), second + jnp.log1p(-share))


def _with_tail(log_probs: Array) -> Array:
    """[..., k + 1]: what is left of 1 comes last."""
    inside = jnp.minimum(jax.nn.logsumexp(log_probs, axis=-1, keepdims=True), -1e-7)  # float32: a tail of 0 has no log
    return jnp.concatenate([log_probs, jnp.log(-jnp.expm1(inside))], axis=-1)


def _log_softmax(logits: Array, temperature: float) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _kl(log_p: Array, log_q: Array) -> Array:
    p = jnp.exp(log_p)
    # A token that cannot be emitted (logit -inf) adds 0: without the inner where, value and gradient would be 0 * inf.
    possible = p > 0
    return jnp.sum(
        p * jnp.where(possible, jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0), 0.0), axis=-1
    )
