"""Where numbers come from: the command, the commit, the versions and the machine."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jaxreason", "jax", "jaxlib", "flax")


def origin(script: str, argv: Sequence[str]) -> dict[str, Any]:
    """``command``, ``commit``, ``versions``, ``hardware`` and ``finished`` (UTC) of this process, ready for JSON."""
    return {
        "command": shlex.join(["python", f"scripts/{script}.py", *argv]),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "hardware": hardware(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its source folder without an installation
        return "not installed"


def commit() -> str:
    """The git commit of this package's own checkout, and whether its files differ from it."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package installed into a folder of somebody's checkout is not part of that checkout.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None or (found := git("rev-parse", "HEAD")) is None:
        return "not a git checkout"
    return f"{found} with changes" if git("status", "--porcelain", "-uno", ":/") else found


def hardware() -> str:
    """The devices that jax computes on, and the machine that they are in."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kinds = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    return f"{kinds}; {_processor()}, {cores} cores, {platform.system()} {platform.machine()}, {jax.process_count()} process(es)"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if sys.platform == "linux" and path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
