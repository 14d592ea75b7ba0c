"""The ratio of policies, at token or sequence level, always as a logarithm broadcast to [B, T]."""

from typing import get_args

import jax.numpy as jnp
from jax import Array
from jax.lax import stop_gradient

from jaxreason.errors import UserError
from jaxreason.losses.axes import Ratio
from jaxreason.losses.segments import Sequences, sequence_mean, sequence_sum


def log_ratio(logp: Array, old_logp: Array, level: Ratio, clamp: float | None, sequences: Sequences) -> Array:
    """[B, T] log of the importance ratio w, with l_t = logp - old_logp:

    - ``token``: log w_t = l_t. GRPO, DAPO.
    - ``sequence_mean``: log w = mean_t l_t, the geometric mean. GSPO (2507.18071).
    - ``sequence_sum``: log w = sum_t l_t, the ratio of the trajectories. TIC-GRPO (2508.02833).
    - ``gspo_token``: value of ``sequence_mean``, gradient of the token itself: sg[mean l] + logp_t - sg[logp_t].

    ``clamp`` bounds |log w| (None: unbounded), which keeps ``exp`` finite in float32; beyond it the gradient is 0.
    """
    token = logp - old_logp
    if level == "token":
        log_w = token
    elif level == "sequence_mean":
        log_w = sequence_mean(token, sequences)
    elif level == "sequence_sum":
        log_w = sequence_sum(token, sequences)
    elif level == "gspo_token":
        log_w = stop_gradient(sequence_mean(token, sequences)) + logp - stop_gradient(logp)
    else:
        raise UserError(f"ratio is {level!r}; it is one of {', '.join(get_args(Ratio))}")
    return log_w if clamp is None else jnp.clip(log_w, -clamp, clamp)
