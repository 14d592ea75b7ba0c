"""Two hosts on this machine: two processes of one run, each with a network, a host name and host names of its own.

usage: unshare --map-root-user --net --mount --uts --fork python tests/faults/network.py ROOT

A virtual cable joins two network namespaces of Linux, each with its own address, so that nothing passes by loopback. Needs
``ip``, ``unshare``, ``nsenter`` and a kernel that lets users make namespaces, but no root. ``scripts/faults.py --network``
calls it.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1)] + [str(Path(__file__).parent)]
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

from harness import ENV, ROOT, equal  # noqa: E402
from helpers import final_params, grpo_words, sft_words  # noqa: E402

TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("host-a", "host-b")
PORT = 29_500
LIMIT = 300  # seconds that a run may take, or take to notice that the other host is gone
RUNS = {
    "sft": ("sft", ()),
    # One minibatch: of several, each process deals its own sequences out, so that others meet than on one host.
    "grpo": ("grpo", ("kl.coef=0.1", "train.updates_per_rollout=2")),
    "luffy": ("grpo", ("loss.name=luffy", "rollout.expert=true")),
    "distill": ("grpo", ("loss.name=distill", "teacher.weights=self", "teacher.context=solution", "teacher.divergence=jsd")),
    "remax": ("grpo", ("advantage.name=remax",)),
    "nll of right samples": ("grpo", ("loss.options={positive_nll_coef: 0.1}",)),
}  # fmt: skip


def missing() -> str | None:
    """Why this machine cannot have two hosts; None: it can."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"no {', '.join(absent)}"
    made = subprocess.run([*inside(), "true"], capture_output=True, text=True)
    return None if made.returncode == 0 else made.stderr.strip()


def inside() -> list[str]:
    """What runs a command in namespaces of its own."""
    return ["unshare", "--map-root-user", "--net", "--mount", "--uts", "--fork"]


def ip(*words: str, at: tuple[str, ...] = ()) -> None:
    subprocess.run([*at, "ip", *words], check=True)


@contextmanager
def hosts(root: Path) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The words that run a command on each of two hosts. The first is this process's own namespace."""
    table = root / "hosts"
    table.write_text("127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for a, name in zip(ADDRESSES, NAMES)))
    subprocess.run(["mount", "--bind", str(table), "/etc/hosts"], check=True)
    subprocess.run(["hostname", NAMES[0]], check=True)
    other = subprocess.Popen(["unshare", "--net", "--uts", "sleep", "86400"])
    try:
        while os.readlink(f"/proc/{other.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.05)
        there = ("nsenter", "--target", str(other.pid), "--net", "--uts")
        subprocess.run([*there, "hostname", NAMES[1]], check=True)
        ip("link", "add", "cable-a", "type", "veth", "peer", "name", "cable-b")
        ip("link", "set", "cable-b", "netns", str(other.pid))
        for at, end, address in zip(((), there), ("cable-a", "cable-b"), ADDRESSES):
            ip("addr", "add", f"{address}/24", "dev", end, at=at)
            ip("link", "set", end, "up", at=at)
            ip("link", "set", "lo", "up", at=at)
        yield (), there
    finally:
        other.kill()
        other.wait()


def start(at: tuple[str, ...], config: str, words: list[str], number: int | None) -> subprocess.Popen:
    """train.py on a host: process ``number`` of two with two devices, or a run of its own with four devices."""
    joined = ["--coordinator", f"{ADDRESSES[0]}:{PORT}", "--num-processes", "2", "--process-id", str(number)]
    if number is None:
        joined = []
    devices = f"--xla_force_host_platform_device_count={4 if number is None else 2}"
    return subprocess.Popen(
        [*at, sys.executable, str(ROOT / "scripts" / "train.py"), "--config", config, *words, *joined],
        cwd=ROOT, env=ENV | {"XLA_FLAGS": devices}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(status, last line of stderr) of each."""
    found = [process.communicate(timeout=LIMIT) for process in processes]
    return [(p.returncode, (error.strip().splitlines() or [""])[-1]) for p, (_, error) in zip(processes, found)]


def words_of(config: str, root: Path, *more: str) -> list[str]:
    if config == "sft":
        return sft_words(root, "train.steps=4", *more)
    return grpo_words(root, "train.steps=2", *more)


def farthest(a: dict, b: dict) -> float:
    """The largest difference of two runs' parameters."""
    import jax
    import numpy as np

    return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def same(root: Path, both: tuple[tuple[str, ...], tuple[str, ...]]) -> bool:
    """Every run by two hosts and by one: the same parameters to 1e-5."""
    good = True
    for name, (config, more) in RUNS.items():
        words = words_of(config, root, *more)
        ends = finished([start(at, config, [*words, "run.name=two"], number) for number, at in enumerate(both)])
        ends += finished([start((), config, [*words, "run.name=one"], None)])
        apart = None
        if [status for status, _ in ends] == [0, 0, 0]:
            apart = farthest(final_params(root / "one"), final_params(root / "two"))
        print(f"two hosts, {name}: " + (f"parameters differ by {apart:.1e}" if apart is not None else f"{ends}"), flush=True)
        good &= apart is not None and apart <= 1e-5
        for made in ("one", "two"):
            shutil.rmtree(root / made, ignore_errors=True)
    return good


def torn(root: Path, both: tuple[tuple[str, ...], tuple[str, ...]]) -> bool:
    """The cable is pulled in the middle of a run: both hosts end, with a status that is not 0, and the run goes on bitwise."""
    words = sft_words(root, "train.steps=60", "train.save_every=5")
    straight = finished([start(at, "sft", [*words, "run.name=straight"], number) for number, at in enumerate(both)])
    processes = [start(at, "sft", [*words, "run.name=torn"], number) for number, at in enumerate(both)]
    log = root / "torn" / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 12):
        assert all(process.poll() is None for process in processes), finished(processes)
        time.sleep(0.05)
    ip("link", "set", "cable-a", "down")
    clock = time.monotonic()
    ends = finished(processes)
    seconds = time.monotonic() - clock
    ip("link", "set", "cable-a", "up")
    again = finished([start(at, "sft", [*words, "run.name=torn"], number) for number, at in enumerate(both)])
    well = [status for status, _ in straight + again] == [0] * 4 and all(status != 0 for status, _ in ends)
    alike = well and equal(final_params(root / "straight"), final_params(root / "torn"))
    statuses = " and ".join(str(status) for status, _ in ends)
    print(f"a pulled cable: both ended within {seconds:.0f} s, status {statuses}; resumed: {'bitwise equal' if alike else again}")
    return alike


def main(root: Path) -> int:
    with hosts(root) as both:
        return 0 if same(root, both) & torn(root, both) else 1


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
