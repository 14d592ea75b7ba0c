"""See `python scripts/compare.py --help`."""

from jaxreason.cli import compare

if __name__ == "__main__":
    raise SystemExit(compare())
