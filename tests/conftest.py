"""Hostile settings: a silent rank promotion is an error in every test."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

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
