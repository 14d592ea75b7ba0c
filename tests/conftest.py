"""Hostile settings: a silent rank promotion is an error in every test."""

import atexit
import collections
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices, so that sharding is tested wherever tests run; most tests use the first one only.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile thousands of programs and run each a few times. XLA's costly passes change no result beyond the rounding that
# tests allow; the tests of compiled programs themselves (tests/test_plan_compiled.py) turn them on again.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Commands that tests run share what they compile, and leave nothing in the user's own cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxreason-tests-xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).parent))
# XLA's GPU compiler has wheels for Linux alone; there the extra "test" installs it, and a missing one is a failure.
collect_ignore = [] if sys.platform == "linux" else ["test_plan_compiled.py"]
if importlib.util.find_spec("lm_eval") is None:  # extra "eval"
    collect_ignore.append("test_harness.py")


@pytest.fixture
def compiled():
    """Counts the compilations of each function during a test, by name.

    The size of a jitted function's cache would not do: all functions of a process share 8,192 entries, and in a process
    that has run many tests the newest entries are evicted first.
    """
    import jax

    found = collections.Counter()

    def seen(event, duration_secs, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(seen)
    yield found
    jax.monitoring.unregister_event_duration_listener(seen)
