"""Verifiable rewards: functions of a finished completion, found by name and run in killable processes.

The pool needs numpy and is imported from its module, so that worker processes start without it.
"""

from jaxreason.rewards.registry import ALIASES, REWARDS, Reward, get
from jaxreason.rewards.sample import Sample, Scored, reward

__all__ = ["ALIASES", "REWARDS", "Reward", "Sample", "Scored", "get", "reward"]
