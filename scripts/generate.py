"""See `python scripts/generate.py --help`."""

from jaxreason.cli import generate

if __name__ == "__main__":
    raise SystemExit(generate())
