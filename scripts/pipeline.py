"""See `python scripts/pipeline.py --help`."""

from jaxreason.cli import pipeline

if __name__ == "__main__":
    raise SystemExit(pipeline())
