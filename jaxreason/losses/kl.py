"""Per-token estimators of KL(policy || reference) from the log-probs of the sampled tokens.

With d = log pi_ref - log pi_theta: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1 (Schulman, "Approximating KL divergence").
As losses on on-policy samples their gradients differ: E grad k1 = 0, E grad k2 = grad KL(policy || ref),
E grad k3 = grad KL(ref || policy). The ``+`` forms take the estimator's value and k2's gradient; ``k3_unbiased`` is
(pi_theta / pi_old) * k3 with the ratio left in the gradient (DeepSeek-V3.2), unbiased for the reverse KL in both.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxreason.errors import UserError

Estimator = Literal["k1", "k2", "k3", "k1+", "k3+", "k3_unbiased"]
ESTIMATORS = get_args(Estimator)


def kl(
    logp: Array,
    ref_logp: Array,
    estimator: Estimator,
    *,
    log_ratio: Array,
    log_ratio_clamp: float | None = None,
    value_clamp: float | None = None,
) -> Array:
    """[B, T] KL estimates, nats.

    ``log_ratio_clamp`` bounds |d| and ``value_clamp`` bounds the result, both with gradient 0 beyond (verl: 20 and 10;
    TRL: none of them). ``log_ratio``, log pi_theta - log pi_old per token, is read by ``k3_unbiased`` only.
    """
    if estimator not in ESTIMATORS:
        raise UserError(f"kl_estimator is {estimator!r}; it is one of {', '.join(ESTIMATORS)}")
    d = ref_logp - logp
    if log_ratio_clamp is not None:
        d = jnp.clip(d, -log_ratio_clamp, log_ratio_clamp)
    k2 = 0.5 * jnp.square(d)
    value = {"1": -d, "2": k2, "3": jnp.expm1(d) - d}[estimator[1]]
    if estimator == "k3_unbiased":
        value = jnp.exp(log_ratio) * value
    if value_clamp is not None:
        value = jnp.clip(value, -value_clamp, value_clamp)
    if estimator.endswith("+"):
        value = stop_gradient(value) + k2 - stop_gradient(k2)
    return value
