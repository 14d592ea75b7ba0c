"""benchmarks/h100_first_hour.sh: it ends within the hour, and one JSON file says of every measurement what became of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "h100_first_hour.sh"
PYTHON = """#!/usr/bin/env bash
case "$*" in
  "- "*) exec {python} "$@" ;;  # puts the report together
  *numerics*) echo "noise"; echo '{{"ok": true, "leakage": {{"out": 0.0}}}}' ;;
  *plan.py*) echo '{{"memory": {{"fits": true}}}}' ;;
  *repeat*) echo "this is no JSON" ;;
  *decode*) echo "RuntimeError: out of memory" >&2; exit 3 ;;
  *grpo*) exit 124 ;;
  *) echo '{{"ok": false, "reason": "no GPU: this ran on cpu"}}' ;;
esac
"""


def test_the_limits_are_below_an_hour():
    text = SCRIPT.read_text()
    minutes = [int(n) for n in re.findall(r"^measure \w+ (\d+) ", text, re.M)]
    assert len(minutes) == 10 and sum(minutes) + len(minutes) * 10 / 60 < 60  # each has 10 s to end after its limit


def test_every_measurement_is_written_down(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    out = tmp_path / "out.json"
    environment = {**os.environ, "PYTHON": str(python), "PRESET": "embedded-tiny", "LENGTH": "64", "COMPLETION": "16"}
    done = subprocess.run(["bash", SCRIPT, out], env=environment, capture_output=True, text=True, check=True, timeout=60)
    report = json.loads(out.read_text())
    assert report["ok"] is False and "see the entries with ok: false" in done.stdout
    assert report["numerics"] == {"ok": True, "leakage": {"out": 0.0}} and report["plan"] == {"memory": {"fits": True}}
    for name in ("decode_64", "decode_128", "decode_while"):
        assert report[name] == {"ok": False, "exit": 3, "reason": "RuntimeError: out of memory"}
    assert report["train_grpo"] == {"ok": False, "exit": 124, "reason": "time limit"}
    assert report["repeat"]["ok"] is False and report["train"]["reason"] == "no GPU: this ran on cpu"
    assert {"train_graphs_off", "train_two_rows", "gpu", "finished"} <= report.keys()
