"""See `python scripts/report.py --help`."""

from jaxreason.cli import report

if __name__ == "__main__":
    raise SystemExit(report())
