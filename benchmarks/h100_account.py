"""Where a GPU's time goes: kernels of one profiled call by kind, read from the profiler's own file."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

# The first kind whose mark a kernel's name has.
_KINDS = (
    ("attention", ("sdpa", "fmha", "compute_dot_do_o", "convert_dq")),
    ("matrix products", ("nvjet", "gemm", "cublas", "cutlass")),
    ("copies", ("memcpy", "Memcpy")),
    ("memory set", ("memset", "Memset", "loop_broadcast")),
    ("updates in place", ("dynamic_update_slice",)),
)


def kind_of(kernel: str) -> str:
    return next((kind for kind, marks in _KINDS if any(mark in kernel for mark in marks)), "other fusions")


def account(call: Callable[[], object]) -> dict:
    """Milliseconds by kind, of the 20 costliest kernels, and from the first kernel's start to the last one's end."""
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        jax.block_until_ready(call())
        jax.profiler.stop_trace()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(files[0]))
    return summary(
        (event.name, event.start_ns, event.duration_ns)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )


def summary(events) -> dict:
    """:func:`account` of (kernel, start, duration) in nanoseconds."""
    kernels: collections.Counter = collections.Counter()
    kinds: collections.Counter = collections.Counter()
    first, last = float("inf"), 0.0
    for name, start, duration in events:
        kernels[name] += duration / 1e6
        kinds[kind_of(name)] += duration / 1e6
        first, last = min(first, start), max(last, start + duration)
    return {
        "kinds_ms": dict(kinds.most_common()),
        "kernels_ms": [(name[:100], ms) for name, ms in kernels.most_common(20)],
        "span_ms": max(0.0, last - first) / 1e6 if kernels else 0.0,
    }
