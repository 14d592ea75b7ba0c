"""Divergences between a student's and a teacher's next-token distributions, on full logits [..., V].

Reference functions: small and exact, for tests and small inputs. Training over a large vocabulary takes them in chunks
  in
the vocabulary head.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxreason.errors import UserError


def forward_kl(student_logits: Array, teacher_logits: Array) -> Array:
    """[...] KL(teacher || student) = sum_v p_T log(p_T / p_S): mass-covering."""
    return _kl(_log_softmax(teacher_logits), _log_softmax(student_logits))


def reverse_kl(student_logits: Array, teacher_logits: Array) -> Array:
    """[...] KL(student || teacher) = sum_v p_S log(p_S / p_T): mode-seeking."""
    return _kl(_log_softmax(student_logits), _log_softmax(teacher_logits))


def generalized_jsd(student_logits: Array, teacher_logits: Array, beta: float = 0.5) -> Array:
    """[...] beta KL(p_T || M) + (1 - beta) KL(p_S || M) with M = beta p_T + (1 - beta) p_S. GKD (2306.13649).

    beta = 0 is the forward and beta = 1 the reverse KL: there the formula itself is 0, and only its quotient by beta
    (or 1 - beta) tends to them. Raises UserError for beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise UserError(f"beta is {beta}; it lies between 0 (forward KL) and 1 (reverse KL)")
    if beta == 0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    student, teacher = _log_softmax(student_logits), _log_softmax(teacher_logits)
    mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _log_softmax(logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)


def _kl(log_p: Array, log_q: Array) -> Array:
    p = jnp.exp(log_p)
    # A token that cannot be emitted (logit -inf) adds 0: without the inner where, value and gradient would be 0 * inf.
    possible = p > 0
    return jnp.sum(
        p * jnp.where(possible, jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0), 0.0), axis=-1
    )
