"""The comparison of losses: the same start, prompts and seeds for each, and one HTML file that shows what differed.

``plan`` says which runs a comparison is made of, ``train`` makes them, ``offline`` compares values and gradients on one
recorded rollout without training, ``finish`` turns the files of runs into the tables on the terminal and the report.
"""

from jaxreason.compare.work import Entry, entries_of, finish, offline, train

__all__ = ["Entry", "entries_of", "finish", "offline", "train"]
