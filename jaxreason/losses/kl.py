"""Per-token estimators of KL(policy || reference) from the log-probs of the sampled tokens.

With d = log pi_ref - log pi_theta: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1 (Schulman, "Approximating KL divergence").
As losses on on-policy samples their gradients differ: E grad k1 = 0, E grad k2 = grad KL(policy || ref),
E grad k3 = grad KL(ref || policy). The ``+`` forms take the estimator's value and k2's gradient; ``k3_unbiased`` is
(pi_theta / pi_old) * k3 with the ratio left in the gradient (DeepSeek-V3.2), unbiased for the reverse KL in both.
"""

from types import ModuleType
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.lax import stop_gradient

from jaxreason.errors import UserError

KlEstimator = Literal["k1", "k2", "k3", "k1+", "k3+", "k3_unbiased"]


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

    ``log_ratio_clamp`` bounds |d| and ``value_clamp`` bounds the result, both with gradient 0 beyond (verl: 20 and 10;
    TRL: none of them). ``log_ratio``, log pi_theta - log pi_old per token, is read by ``k3_unbiased`` only.
    """
    result = _forward(jnp, estimator, logp, ref_logp, log_ratio_clamp)
    if estimator == "k3_unbiased":
        result = jnp.exp(log_ratio) * result
    if value_clamp is not None:
        result = jnp.clip(result, -value_clamp, value_clamp)
    if estimator.endswith("+"):
        k2 = _forward(jnp, "k2", logp, ref_logp, log_ratio_clamp)
        result = stop_gradient(result) + k2 - stop_gradient(k2)
    return result


def value(
    estimator: KlEstimator, logp: np.ndarray, ref_logp: np.ndarray, *, log_ratio_clamp: float | None = None
) -> np.ndarray:
    """The estimates as numpy arrays of the shape of ``logp``, nats, without any gradient: for KL in the reward.

    ``logp`` is of the policy that sampled, so ``k3_unbiased`` is ``k3`` (its ratio is 1), and the ``+`` forms are ``k1`` and
    ``k3``. ``log_ratio_clamp`` bounds |d|; without it ``k3`` is infinite in float32 from d = 89 on.
    """
    return _forward(np, estimator, np.asarray(logp), np.asarray(ref_logp), log_ratio_clamp)


def _forward(xp: ModuleType, estimator: KlEstimator, logp: Any, ref_logp: Any, clamp: float | None) -> Any:
    """k1, k2 or k3 in the arithmetic of ``xp``, numpy or jax.numpy."""
    if estimator not in get_args(KlEstimator):
        raise UserError(f"kl_estimator is {estimator!r}; it is one of {', '.join(get_args(KlEstimator))}")
    d = ref_logp - logp
    if clamp is not None:
        d = xp.clip(d, -clamp, clamp)
    return {"1": lambda: -d, "2": lambda: 0.5 * xp.square(d), "3": lambda: xp.expm1(d) - d}[estimator[1]]()
