"""Where numbers come from: the command, the commit, the versions and the machine."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxreason.errors import UserError

_PACKAGES = ("jaxreason", "jax", "jaxlib", "flax")
FILE = "origin.json"  # of a run
ORIGIN = ("command", "commit", "versions", "hardware")


def origin(words: str | None = None) -> dict[str, Any]:
    """``command`` (``words``; None: what this process was started with), ``commit``, ``versions``, ``hardware`` and ``time``
    (UTC), ready for JSON."""
    return {
        "command": _typed() if words is None else words,
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "hardware": hardware(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _typed() -> str:
    """What this process was started with: a script, or an installed command."""
    program = Path(sys.argv[0])
    return shlex.join(["python", *sys.argv] if program.suffix == ".py" else [program.name, *sys.argv[1:]])


def command(script: str, argv: Sequence[str]) -> str:
    """A line for a shell."""
    return shlex.join(["python", f"scripts/{script}.py", *argv])


def read_origins(run: Path) -> list[dict[str, Any]]:
    """What started a run, one record for each start; none where nothing was written."""
    path = run / FILE
    if not path.is_file():
        return []
    try:
        found = [dict(item) for item in json.loads(path.read_bytes())]
        return [{**dict.fromkeys((*ORIGIN, "time"), ""), **item, "versions": dict(item.get("versions", {}))} for item in found]
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; delete it; only the record of what started this run is lost") from None


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
    import jax  # a second, which a report that only reads these records does without

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
