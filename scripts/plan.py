"""See `python scripts/plan.py --help`."""

from jaxreason.cli import plan

if __name__ == "__main__":
    raise SystemExit(plan())
