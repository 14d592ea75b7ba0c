"""Trains what a config says.

usage: python scripts/train.py --config NAME|PATH [key=value ...] [--print-config] [--dry-run]
"""

from jaxreason.cli import train

if __name__ == "__main__":
    raise SystemExit(train())
