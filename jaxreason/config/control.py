"""The control of a claim about reinforcement learning: the same run, rewarded for its format alone."""

from jaxreason.config.grpo import GrpoConfig, RewardTerm
from jaxreason.config.run import RunConfig
from jaxreason.errors import UserError

_OF_FORMAT = ("format", "tag_count")


def control(config: RunConfig) -> GrpoConfig:
    """The config with nothing but format rewards, as ``NAME-control``.

    What such a run gains is not what right answers teach: much of a gain can be the format (arXiv 2503.20783). Its format
    rewards are those that the config has; where it has none, ``format``. Raises UserError for a run without rewards.
    """
    if not isinstance(config, GrpoConfig):
        raise UserError("--control is for reinforcement learning (algorithm: grpo); supervised fine-tuning has no reward")
    kept = [term for term in config.reward.functions if term.name in _OF_FORMAT] or [RewardTerm(name="format")]
    reward = config.reward.model_copy(update={"functions": kept})
    run = config.run.model_copy(update={"name": f"{config.run.name}-control"})
    return config.model_copy(update={"reward": reward, "run": run})
