"""Per-token estimators of KL(policy || reference) from the log-probs of the sampled tokens.

With d = log pi_ref - log pi_theta: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1 (Schulman, "Approximating KL divergence") and
abs = |d|. As losses on on-policy samples their gradients differ: E grad k1 = 0, E grad k2 = grad KL(policy || ref),
E grad k3 = grad KL(ref || policy). The ``+`` forms take the estimator's value and k2's gradient; the ``_unbiased`` forms
multiply by a ratio that stays in the gradient (DeepSeek-V3.2: (pi_theta / pi_old) * k3), unbiased for the reverse KL in both.
"""

from types import ModuleType
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient

from jaxreason.errors import UserError
from jaxreason.losses.axes import KlEstimator


def kl(
    logp: Array,
    ref_logp: Array,
    estimator: KlEstimator,
    *,
    log_ratio: Array,
    log_ratio_clamp: float | None = None,
    value_clamp: float | None = None,
) -> Array:
    """[B, T] KL estimates, nats.

    ``log_ratio_clamp`` bounds |d| and ``value_clamp`` bounds the result (verl: 20 and 10 of k3; TRL: none of them), both with
    gradient 0 beyond; the gradient of the ``+`` forms is k2's of the unbounded d. ``log_ratio`` is the logarithm of what the
    ``_unbiased`` forms multiply by.
    """
    result = _forward(jnp, estimator, logp, ref_logp, log_ratio_clamp)
    if estimator.endswith("_unbiased"):
        weight = jnp.exp(log_ratio)
        if log_ratio_clamp is not None:
            weight = jnp.where(jnp.abs(ref_logp - logp) <= log_ratio_clamp, weight, stop_gradient(weight))
        result = weight * result
    if value_clamp is not None:
        result = jnp.clip(result, -value_clamp, value_clamp)
    if estimator.endswith("+"):
        k2 = 0.5 * jnp.square(ref_logp - logp)
        result = stop_gradient(result) + k2 - stop_gradient(k2)
    return result


def value(
    estimator: KlEstimator, logp: np.ndarray, ref_logp: np.ndarray, *, log_ratio_clamp: float | None = None
) -> np.ndarray:
    """The estimates as numpy arrays of the shape of ``logp``, nats, without any gradient: for KL in the reward.

    ``logp`` is of the policy that sampled, so the ``_unbiased`` forms have the ratio 1, and the ``+`` forms are the estimators
    themselves. ``log_ratio_clamp`` bounds |d|; without it ``k3`` is infinite in float32 from d = 89 on.
    """
    return _forward(np, estimator, np.asarray(logp), np.asarray(ref_logp), log_ratio_clamp)


def _forward(xp: ModuleType, estimator: KlEstimator, logp: Any, ref_logp: Any, clamp: float | None) -> Any:
    """k1, k2, k3 or abs in the arithmetic of ``xp``, numpy or jax.numpy."""
    if estimator not in get_args(KlEstimator):
        raise UserError(f"kl_estimator is {estimator!r}; it is one of {', '.join(get_args(KlEstimator))}")
    d = ref_logp - logp
    if clamp is not None:
        d = xp.clip(d, -clamp, clamp)
    forms = {"k1": lambda: -d, "k2": lambda: 0.5 * xp.square(d), "k3": lambda: xp.expm1(d) - d, "abs": lambda: xp.abs(d)}
    return forms[estimator.removesuffix("_unbiased").removesuffix("+")]()
