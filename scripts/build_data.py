"""See `python scripts/build_data.py --help`."""

from jaxreason.cli import build_data

if __name__ == "__main__":
    raise SystemExit(build_data())
