"""Divergences between a student's and a teacher's next-token distributions, on full logits [..., V].

Pure functions of small logits. Training hands them chunks of tokens at a time (``model.chunked``), so that a
``[B, T, V]`` array never exists. ``temperature`` divides both models' logits and scales nothing else (GKD, 2306.13649).
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax import Array
from pydantic import Field

from jaxreason.errors import UserError
from jaxreason.losses.inputs import Fraction

Temperature = Annotated[float, Field(gt=0)]


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
    # Where neither can emit the token its gradient would be NaN: both stand in with the same finite number, which adds 0.
    neither = (student == -jnp.inf) & (teacher == -jnp.inf)
    low = jnp.float32(jnp.finfo(jnp.float32).min / 4)
    student, teacher = (jnp.where(neither, low, x) for x in (student, teacher))
    mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def topk_entropy(logits: Array, k: int = 20) -> Array:
    """[...] entropy, nats, of the k largest probabilities made to sum to 1 (EAFT, 2601.02151)."""
    top = _log_softmax(jax.lax.top_k(logits, min(k, logits.shape[-1]))[0], 1.0)
    return -jnp.sum(jnp.exp(top) * top, axis=-1)


def _log_softmax(logits: Array, temperature: float) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _kl(log_p: Array, log_q: Array) -> Array:
    p = jnp.exp(log_p)
    # A token that cannot be emitted (logit -inf) adds 0: without the inner where, value and gradient would be 0 * inf.
    possible = p > 0
    return jnp.sum(
        p * jnp.where(possible, jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0), 0.0), axis=-1
    )
