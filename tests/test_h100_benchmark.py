"""benchmarks/h100.py: the first tier ends within five minutes, and its JSON says of every part what became of it."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *numerics*) echo "noise"; echo '{"ok": true, "leakage": {"out": 0.0}}' ;;
  *decode*) echo "RuntimeError: out of memory" >&2; exit 3 ;;
  *grpo*) echo "this is no JSON" ;;
  *) sleep 5 ;;
esac
"""


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import h100

    yield h100
    sys.modules.pop("h100")


def test_the_first_tier_ends_within_five_minutes(h100):
    assert sum(part.seconds for part in h100.PARTS if part.tier == 1) <= 300
    tiers = [part.tier for part in h100.PARTS]
    assert tiers == sorted(tiers)


def test_every_part_is_written_down_as_it_ends(h100, tmp_path, monkeypatch, capsys):
    python, out = tmp_path / "python", tmp_path / "out.json"
    python.write_text(PYTHON)
    python.chmod(0o755)
    short = h100.Part("sft", 1, h100.PARTS[1].command)
    monkeypatch.setattr(h100, "PARTS", (h100.PARTS[0], short, *h100.PARTS[2:4]))
    monkeypatch.setattr(sys, "argv", ["h100.py", str(out), "--python", str(python)])
    assert h100.main() == 1
    report = json.loads(out.read_text())
    assert report["numerics"].pop("wall_seconds") > 0
    assert report["numerics"] == {"ok": True, "leakage": {"out": 0.0}}
    assert report["sft"] == {"ok": False, "reason": "time limit of 1 s"}
    assert report["grpo_update"]["reason"].startswith("no JSON") and not report["grpo_update"]["ok"]
    assert report["decode"]["exit"] == 3 and report["decode"]["reason"] == "RuntimeError: out of memory"
    assert capsys.readouterr().out.count("\n") == 4


def test_every_probe_runs(monkeypatch):
    """On this machine's devices, at a size that is nothing: what a card would be asked for, but for cuDNN."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import h100_probe

    def found(what, *words):
        words = (what, "--preset", "embedded-tiny", "--length", "64", "--microbatches", "2", "--steps", "1", *words)
        return h100_probe.PARTS[what](h100_probe.arguments().parse_args(words))

    step = found("train", "--loss", "grpo")
    tokens = 2 * 8 * 64  # a row a microbatch on each of eight devices
    assert step["ok"] and step["tokens_per_second"] == pytest.approx(tokens / step["step_seconds"])
    again = found("repeat")
    assert again["ok"] and again["parameters"] > 5 and again["parameters_that_differ"] == 0
    assert found("decode", "--slots", "8")["tokens_per_second"] > 0
    assert found("head")["relative_error"] < 1e-5
    assert found("numerics") | {"blockwise_error": {}} == {
        "blockwise_error": {}, "backend": "blockwise", "ok": False, "reason": "cuDNN attention is not available here",
    }  # fmt: skip


def test_kernels_add_up_by_kind(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from h100_account import summary

    found = summary([("nvjet_sm90", 0, 2e6), ("memcpy128", 2e6, 1e6), ("nvjet_sm90", 5e6, 1e6), ("loop_add_fusion", 6e6, 4e6)])
    assert found["kinds_ms"] == {"other fusions": 4.0, "matrix products": 3.0, "copies": 1.0}
    assert found["span_ms"] == 10.0 and found["kernels_ms"][1] == ("nvjet_sm90", 3.0)
