"""A loss with inputs of its own, the reward and the advantage estimator that fill them: one file, no edit in jaxreason.

Train with it:

    F=examples/token_reward.py
    python scripts/train.py --config grpo run.name=own loss.name=$F:token_rewarded advantage.name=$F:centred_with_pass_rate \
        "reward.functions=[{name: accuracy}, {name: '$F:no_repetition', weight: 0.2}]"

An input of your own is a number for every token of a completion. Whoever makes it declares its name in ``fills``, the loss
declares it in ``needs`` and reads it as ``inputs.extras[name]`` [B, T], beside the fields that every loss has. That each name
is filled by somebody is checked at start-up; packing, microbatches, sharding, ``plan.py`` and ``compare.py`` carry it.
"""

import jax.numpy as jnp
import numpy as np

from jaxreason import losses, rewards


@rewards.reward(fills=("token_reward",))
def no_repetition(sample: rewards.Sample, length: int = 3) -> rewards.Scored:
    """1 − the share of tokens that end an n-gram which was there before; −1 at exactly those tokens, 0 at the others."""
    seen: set[tuple[int, ...]] = set()
    per_token = []
    for end in range(1, len(sample.tokens) + 1):
        gram = tuple(sample.tokens[max(0, end - length) : end])
        per_token.append(-1.0 if gram in seen else 0.0)
        seen.add(gram)
    return rewards.Scored(1.0 + sum(per_token) / len(per_token), {"token_reward": per_token})


@losses.estimator(fills=("pass_rate",))
def centred_with_pass_rate(rewards_P_G: np.ndarray, lengths_P_G: np.ndarray):
    """R − mean of the group, and for every token the share of the group's samples that earned more than half a point."""
    known = np.where(np.isnan(rewards_P_G), 0.0, rewards_P_G)
    centred = known - np.nanmean(rewards_P_G, axis=1, keepdims=True)
    rates = np.mean(known > 0.5, axis=1)
    per_token = [[np.full(int(n), rate) for n in row if not np.isnan(n)] for rate, row in zip(rates, lengths_P_G)]
    return np.where(np.isnan(rewards_P_G), 0.0, centred), {"pass_rate": per_token}


@losses.loss(kind="policy", needs=("token_reward", "pass_rate"))
def token_rewarded(inputs: losses.PolicyInputs, penalty: float = 0.1):
    """−w (A (3/2 − p) + c r_t), a mean over the step's tokens: hard problems weigh more, and a repetition is punished where
    it happens. w: ratio; p: the group's pass rate; r_t: the token's own reward; c: ``penalty``."""
    inputs, _ = losses.clean(inputs)
    ratio = jnp.exp(jnp.clip(inputs.logp - inputs.old_logp, -20.0, 20.0))
    earned = inputs.advantages * (1.5 - inputs.extras["pass_rate"]) + penalty * inputs.extras["token_reward"]
    weights = (inputs.mask > 0) / inputs.totals.tokens
    return -jnp.sum(weights * ratio * earned), {"repetition": -jnp.sum(weights * inputs.extras["token_reward"])}
