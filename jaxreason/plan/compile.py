"""Compiles for GPUs that are not here, from stock wheels: no driver, no device, nothing allocated."""

import contextlib
import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxreason import config as cfg
from jaxreason import xla
from jaxreason.errors import UserError, present
from jaxreason.model import cudnn
from jaxreason.plan import hlo
from jaxreason.sharding import make_mesh
from jaxreason.targets import Target

# Tuning on a card takes cuBLAS for nearly all products of training; a compilation without one cannot tune and takes Triton.
_AS_TUNED: dict[str, bool | str] = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function; all bytes are of one device."""

    name: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # outputs that take the place of donated arguments
    temp_bytes: int
    host_bytes: int
    seconds: float  # of tracing and compiling
    loops: int  # how often a loop whose end only the data knows runs at most: microbatches, or decoding steps
    text: str = dataclasses.field(repr=False)

    @property
    def total_bytes(self) -> int:
        """Most that the program needs at once, arguments included."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    @property
    def attention_calls(self) -> tuple[int, int]:
        """Forward and backward calls of cuDNN's attention in one run of the program."""
        found = hlo.custom_calls(self.text, self.loops)
        return found.get("__cudnn$fmhaSoftmax", 0), found.get("__cudnn$fmhaSoftmaxBackward", 0)

    @property
    def collectives(self) -> list[hlo.Collective]:
        return hlo.collectives(self.text, self.loops)


def check_installed() -> None:
    """Raises UserError where the compiler for GPUs is missing."""
    plugins = [name for name in ("jax_cuda13_plugin", "jax_cuda12_plugin") if importlib.util.find_spec(name)]
    if not plugins or importlib.util.find_spec("nvidia") is None:
        raise UserError(
            "planning compiles for a GPU and needs XLA's GPU compiler and cuDNN (no GPU): "
            "pip install 'jaxreason[plan]'; docs/h100.md has the small install without CUDA's libraries"
        )


def mesh_of(target: Target, hosts: int, devices: int, mesh: cfg.Mesh) -> Mesh:
    """The config's mesh over ``hosts`` × ``devices`` GPUs that are not here."""
    from jax.experimental import topologies

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    check_installed()
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target.proto(), topology=f"1x{hosts}x{devices}"
    )
    return make_mesh(mesh, topology.devices)


@contextlib.contextmanager
def compiling_for(target: Target, mesh: Mesh) -> Iterator[None]:
    """Inside, functions are traced for ``mesh`` and choose what they would choose on ``target``."""
    settings = {
        "jax_compiler_enable_remat_pass": False,  # as jaxreason.xla sets it on a GPU
        "jax_persistent_cache_min_compile_time_secs": 1e9,  # what is kept of these compilations cannot be read again
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        with cudnn.assume_capability(target.capability), jax.set_mesh(mesh):
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def compile_program(
    name: str,
    jitted: jax.stages.Wrapped,
    *arguments: Any,
    target: Target,
    mesh: Mesh,
    loops: int = 1,
    deterministic: bool = False,
) -> Program:
    """Compiles ``jitted`` for shapes ``arguments``, each with a sharding on ``mesh``, with the XLA flags of such a run."""
    started = time.monotonic()
    with compiling_for(target, mesh):
        options = {**xla.compile_options(mesh.size, deterministic), **_AS_TUNED}
        compiled = jitted.lower(*arguments).compile(options)
    memory = present(compiled.memory_analysis(), "the memory of XLA's program")
    return Program(
        name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
        time.monotonic() - started,
        loops,
        present(compiled.as_text(), "the text of XLA's program"),
    )
