"""Kills, damaged files, hostile inputs and long runs, counted; what docs/reliability.md says was counted by this.

usage: python scripts/faults.py [--long] [--kills N] [--fuzz N] [--steps N] [--no-damage] [--network]

Without ``--long`` the numbers are small: minutes. Each part prints its counts; the exit status is 1 if anything was lost,
differed or was raised that should not have been. It runs from a clone, whose tests/ it uses.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def kills(root: Path, count: int) -> bool:
    """``count`` kills of each kind."""
    import harness

    harness.finished(root)
    counted: Counter = Counter()
    for kind in harness.kinds(root):
        found = harness.kill(root, kind, count)
        counted += found
        print(f"kills of {kind}: {found['kills']}, ended {found['ends']} times, differed {found['differ']}", flush=True)
    return counted["differ"] == 0


def damage(root: Path) -> bool:
    """Every file of a run, a token cache and an export, four damages each."""
    import harness

    run, cache, export = harness.finished(root)
    unseen = []
    for name, folder, read in (("run", run, harness.read_run), ("cache", cache, harness.read_cache),
                               ("export", export, harness.read_export)):  # fmt: skip
        found = harness.damage(folder, read)
        unseen += found.unseen
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(found.outcomes.items()))
        print(f"damaged files of the {name}: {sum(found.outcomes.values())}: {counts}", *found.unseen, sep="\n  ", flush=True)
    return not unseen


def hostile(root: Path, count: int) -> bool:
    """``count`` inputs, shared among the doors."""
    import fuzz

    doors, failed, each = fuzz.Doors(root), [], -(-count // len(fuzz.DOORS))
    for door in fuzz.DOORS:
        began = time.monotonic()
        refused, found = fuzz.fuzz(doors, door, range(each))
        failed += found
        print(f"inputs of {door}: {each}, refused {refused}, raised {len(found)} ({time.monotonic() - began:.0f} s)", flush=True)
        print(*found[:20], sep="\n", end="\n" if found else "")
    return not failed


def flat(root: Path, steps: int) -> bool:
    """A GRPO run, whose memory, files and threads after a tenth of it are those at its end."""
    import harness

    uses = harness.watch(root, steps)
    early, late = harness.ends_of(uses, steps)
    print(f"GRPO, {steps} steps: {early} -> {late}")
    return harness.is_flat(early, late)


def network(root: Path) -> bool:
    """Two hosts with a network between them: what one host trains, and a cable that is pulled."""
    import network

    if reason := network.missing():
        print(f"two hosts: not possible here: {reason}")
        return False
    return subprocess.run([*network.inside(), sys.executable, network.__file__, str(root)]).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="1,000 kills, 1,000,000 inputs, 2,000 steps: a day")
    parser.add_argument("--kills", type=int, metavar="N", help="of each of four kinds (2; --long: 250); 0: none")
    parser.add_argument("--fuzz", type=int, metavar="N", help="inputs (2,000; --long: 1,000,000); 0: none")
    parser.add_argument("--steps", type=int, metavar="N", help="of the GRPO run (60; --long: 2,000); 0: none")
    parser.add_argument("--no-damage", action="store_true", help="damage no files")
    parser.add_argument("--network", action="store_true", help="two hosts by Linux's namespaces: five minutes (--long: too)")
    args = parser.parse_args()
    given = (args.kills, args.fuzz, args.steps)
    default = (250, 1_000_000, 2_000) if args.long else (2, 2_000, 60)
    count, inputs, steps = (d if g is None else g for g, d in zip(given, default))
    good = True
    for part, wanted in ((lambda p: hostile(p, inputs), inputs), (damage, not args.no_damage),
                         (lambda p: flat(p, steps), steps), (lambda p: kills(p, count), count),
                         (network, args.network or args.long)):  # fmt: skip
        if wanted:
            with tempfile.TemporaryDirectory(prefix="faults-") as folder:
                good &= part(Path(folder))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
