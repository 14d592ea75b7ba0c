#!/usr/bin/env bash
# The first hour on a rented H100: everything in docs/h100.md that only the card can tell, in one JSON file.
#
#   bash benchmarks/h100_first_hour.sh [OUT.json]
#
# Every measurement has a process and a time limit of its own, a failed one is written down as failed, and all limits
# together are below 60 minutes. PRESET, TARGET (the card), LENGTH, COMPLETION and PYTHON may be set; nothing is downloaded.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-h100_first_hour.json}
python=${PYTHON:-python}
preset=${PRESET:-llama3.2-3b}
target=${TARGET:-h100}
length=${LENGTH:-8192}
completion=${COMPLETION:-1024}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

# measure NAME MINUTES COMMAND...: its last line is a JSON object; anything else is a failure with its last words
measure() {
  local name=$1 minutes=$2 code
  shift 2
  echo "== $name (at most $minutes min): $*"
  timeout --kill-after=10 "${minutes}m" "$@" >"$parts/$name.out" 2>"$parts/$name.err"
  code=$?
  tail -n 1 "$parts/$name.out" | cut -c1-300
  printf '%s' "$code" >"$parts/$name.code"
}

probe="$python benchmarks/h100_probe.py --target $target"
nvidia-smi --query-gpu=name,memory.total,clocks.max.sm,power.limit,driver_version --format=csv,noheader \
  >"$parts/gpu.txt" 2>/dev/null || echo "nvidia-smi not found" >"$parts/gpu.txt"

# Is it right? Packed cuDNN attention has never run: this decides whether anything below means something.
measure numerics 5 $probe numerics --length 2048
# Is it as planned? Memory to the byte against the plan, speed against its MFU table.
measure plan 3 env JAX_PLATFORMS=cpu $python scripts/plan.py --config "$preset/sft" --target "$target" --json
measure train 8 $probe train --preset "$preset" --length "$length"
measure train_graphs_off 7 env XLA_FLAGS=--xla_gpu_enable_command_buffer= $probe train --preset "$preset" --length "$length"
# Do two rows at once pay? They fit at half the length only.
measure train_two_rows 6 $probe train --preset "$preset" --length $((length / 2)) --rows 2
# The update of llama3.2-3b/grpo: a quarter of a row's length and two rows, all of a policy loss's inputs.
measure train_grpo 5 $probe train --loss grpo --preset "$preset" --length $((length / 4 + length / 16)) --rows 2
# The same bits twice? cuDNN's backward pass adds atomically unless it is told not to.
measure repeat 5 $probe repeat --preset "$preset" --length $((length / 4))
# How far is decoding from the bandwidth limit, and does one graph for the whole loop help?
measure decode_64 6 $probe decode --preset "$preset" --length "$completion" --slots 64
measure decode_128 6 $probe decode --preset "$preset" --length "$completion" --slots 128
measure decode_while 6 env XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE $probe decode --preset "$preset" --length "$completion" --slots 64

"$python" - "$parts" "$out" <<'PY'
import json, pathlib, sys, time
parts, out = map(pathlib.Path, sys.argv[1:])
report = {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "gpu": (parts / "gpu.txt").read_text().split("\n")[0]}
for path in sorted(parts.glob("*.code"), key=lambda p: p.stat().st_mtime):
    name, code = path.stem, int(path.read_text())
    lines = (parts / f"{name}.out").read_text().strip().splitlines()
    try:
        if code:
            raise ValueError(code)
        report[name] = json.loads(lines[-1])
    except (IndexError, ValueError):
        said = (parts / f"{name}.err").read_text().strip()[-2000:]
        report[name] = {"ok": False, "exit": code, "reason": "time limit" if code in (124, 137) else said}
report["ok"] = all(part.get("ok", True) for part in report.values() if isinstance(part, dict))
out.write_text(json.dumps(report, indent=1) + "\n")
print(f"wrote {out}: " + ("all measurements ran" if report["ok"] else "see the entries with ok: false"))
PY
