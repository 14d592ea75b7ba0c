"""See `python scripts/convert.py --help`."""

from jaxreason.cli import convert

if __name__ == "__main__":
    raise SystemExit(convert())
