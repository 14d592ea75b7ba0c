"""Starts processes that run one module of this package, on one line to it and away from everything else of this one."""

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing import connection as mp_connection
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent / "__init__.py"
# This very package, wherever it was imported from, and without its folder on the path of modules.
_START = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("jaxreason", {package!r})
sys.modules["jaxreason"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from {module} import main
main({descriptor})
"""


class Process:
    """A fresh interpreter that calls ``main(descriptor)`` of a module, where ``descriptor`` is its end of ``connection``.

    Not multiprocessing's spawn: that runs the main module in every process, and a training script's imports jax. It finds
    modules where this one does, but in the directory that the run was started from last: a numbers.py there is not Python's
    own. It leads a session: a terminal's Ctrl-C is the run's, and ``kill`` reaches what it started.
    """

    def __init__(self, module: str, environment: dict[str, str]):
        here, places = os.getcwd(), list(map(os.path.abspath, sys.path))
        places.sort(key=lambda path: path == here)
        self.connection, theirs = mp_connection.Pipe()
        with theirs:
            self.popen = subprocess.Popen(
                # -P: Python itself would put the current directory first.
                [sys.executable, "-P", "-c",
                 _START.format(package=str(_PACKAGE), module=module, descriptor=theirs.fileno())],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(places)} | environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def kill(self) -> str:
        """Kills the process and all that it started, reaps it, and says how it ended, which may have been before."""
        if self.popen.returncode is None:  # else it is reaped, and its id may be another's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, signal.SIGKILL)
        code = self.popen.wait()
        self.connection.close()
        return f"the process {f'died of {signal.Signals(-code).name}' if code < 0 else f'exited with status {code}'}"
