"""See `python scripts/evaluate.py --help`."""

from jaxreason.cli import evaluate

if __name__ == "__main__":
    raise SystemExit(evaluate())
