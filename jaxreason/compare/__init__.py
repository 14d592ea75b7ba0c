"""The comparison of losses: the same start, prompts and seeds for each, and one HTML file that shows what differed.

``plan`` says which runs a comparison is made of, ``train`` makes them, ``offline`` compares values and gradients on one
recorded rollout without training, ``finish`` turns the files of runs into the tables on the terminal and the report.
"""

from jaxreason.compare.work import Planned, finish, offline, plan, train

__all__ = ["Planned", "finish", "offline", "plan", "train"]
