"""Runs a step again whose loss or gradient was not finite, and says which rows it comes from.

usage: python scripts/replay.py RUN [--update N]
"""

from jaxreason.cli import replay

if __name__ == "__main__":
    raise SystemExit(replay())
