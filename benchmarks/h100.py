"""What only the card can tell, for a card rented by the minute: everything in docs/h100.md that was measured, again.

    python benchmarks/h100.py h100.json               # the first tier: numerics, SFT step, GRPO update, decoding; 5 minutes
    python benchmarks/h100.py h100.json --tier 2      # then also: layers in a loop, bits twice, more slots, whole runs

Parts run in order of value, each in a process of its own and under a time limit; the JSON file is written after every
part, so that what was measured stays when the card goes. A part that fails is written down with its last words. It needs
a GPU with jax for it and this package; nothing is downloaded.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Part:
    """One measurement: ``command`` prints a JSON object as its last line, or is a whole run of ``scripts/train.py``."""

    name: str
    seconds: int
    command: tuple[str, ...]
    tier: int = 1


def probe(name: str, seconds: int, *words: str, tier: int = 1) -> Part:
    return Part(name, seconds, (str(HERE / "h100_probe.py"), *words), tier)


def run_of(name: str, seconds: int, *words: str) -> Part:
    """A whole run of random weights on the embedded task."""
    shape = ("model.preset=llama3.2-3b", "model.compute_dtype=bfloat16", "model.scan_layers=false", "eval.problems=0")
    return Part(name, seconds, (str(HERE.parent / "scripts" / "train.py"), *words, *shape), tier=2)


PARTS = (
    probe("numerics", 45, "numerics", "--length", "2048"),
    probe("sft", 90, "train", "--unrolled", "--account"),
    probe("grpo_update", 75, "train", "--loss", "grpo", "--length", "2560", "--rows", "2", "--unrolled"),
    probe("decode", 75, "decode", "--length", "1024", "--slots", "64"),
    probe("head", 45, "head", tier=2),
    probe("sft_loop", 60, "train", "--account", tier=2),
    probe("sft_one_document", 75, "train", "--unrolled", "--documents", "1", tier=2),
    probe("decode_128", 75, "decode", "--length", "1024", "--slots", "128", tier=2),
    probe("repeat", 150, "repeat", "--length", "2048", tier=2),
    run_of("first_step_sft", 120, "--config", "sft", "train.steps=1"),
    run_of("grpo_run", 300, "--config", "grpo", "train.steps=2", "rollout.slots=auto", "rollout.offload_state=true",
           "rollout.max_completion_tokens=512"),
)


def measure(part: Part, python: str) -> dict:
    """What the part printed, or what became of it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        whole_run = "train.py" in part.command[0]
        words = (f"run.dir={folder}", f"run.name={part.name}") if whole_run else ()
        try:
            done = subprocess.run(
                [python, *part.command, *words], capture_output=True, text=True, timeout=part.seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return {"ok": False, "reason": f"time limit of {part.seconds} s"}
        wall = {"wall_seconds": time.monotonic() - began}
        if done.returncode:
            return wall | {"ok": False, "exit": done.returncode, "reason": done.stderr.strip()[-2000:]}
        if whole_run:
            lines = (Path(folder) / part.name / "metrics.jsonl").read_text().splitlines()
            return wall | {"ok": True, "steps": [json.loads(line) for line in lines]}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]) | wall
    except (IndexError, ValueError):
        return wall | {"ok": False, "reason": f"no JSON in its last line: {done.stdout.strip()[-500:]}"}


def write(path: Path, report: dict) -> None:
    """All of the report or, if this is cut off, what was there before."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, path)


SHOWN = ("step_seconds", "tokens_per_second", "mfu", "peak_bytes", "of_bandwidth_limit", "compile_seconds", "one_pass_ms",
         "two_passes_ms", "reason")  # fmt: skip


def line(name: str, found: dict) -> str:
    values = (f"{key} {found[key]:.4g}" if isinstance(found[key], float) else f"{key} {str(found[key])[-200:]}" for key in SHOWN
              if found.get(key) is not None)  # fmt: skip
    return f"{name:18}{'ok' if found['ok'] else 'FAILED':8}" + "  ".join(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the JSON file")
    parser.add_argument("--tier", type=int, default=1, choices=(1, 2))
    parser.add_argument("--python", default=sys.executable, help="interpreter of the parts")
    args = parser.parse_args()
    report: dict = {}
    for part in (part for part in PARTS if part.tier <= args.tier):
        report[part.name] = measure(part, args.python)
        write(args.out, report)
        print(line(part.name, report[part.name]), flush=True)
    return 0 if all(found["ok"] for found in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
