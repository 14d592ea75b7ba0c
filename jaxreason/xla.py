"""XLA's settings for a run: flags, allocator, caches. To be called before the first device is touched.

What is set and why, on a GPU (defaults are those of jax 0.10.2; docs/h100.md has the sources):

- the memory fraction, because the default allocator takes only 75 % of the card;
- no rematerialisation by the compiler, because remat policies choose what is computed twice, and jaxreason.plan counts
  memory the same way;
- with several GPUs, overlap of collectives with compute, and combining thresholds above one layer's parameters;
- a compilation cache, so that a resumed run starts at once; on a CPU it is all that :func:`configure` sets, and
  :func:`start_with_huge_pages` is for its memory.

An unknown flag aborts the whole process with a C++ stack trace, so flags are first tried in another process.
"""

import functools
import os
import platform as machine
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from jaxreason.errors import UserError
from jaxreason.paths import expanded

MEMORY_FRACTION = "0.92"
_FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # jax refuses both at once; the second is old
_OVERLAP = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_while_loop_double_buffering=true",
    f"--xla_gpu_all_gather_combine_threshold_bytes={2**30}",
    f"--xla_gpu_all_reduce_combine_threshold_bytes={2**30}",
    f"--xla_gpu_reduce_scatter_combine_threshold_bytes={2**27}",
)
_PIPELINED = ("all_gather", "all_reduce", "reduce_scatter")  # a loop's collectives run beside the round before
_DETERMINISTIC = ("--xla_gpu_exclude_nondeterministic_ops=true", "--xla_gpu_autotune_level=0")


def flags(platform: Literal["cpu", "gpu"], devices: int, deterministic: bool) -> tuple[str, ...]:
    """The XLA flags of a run on ``devices`` devices over all hosts."""
    if platform == "cpu":
        return ()
    return (*((*_OVERLAP, *_pipelined()) if devices > 1 else ()), *(_DETERMINISTIC if deterministic else ()))


def _pipelined() -> tuple[str, ...]:
    """As the installed XLA calls it: jax 0.12 has three modes where 0.10 had a switch, whose name it only maps."""
    modes = tuple(f"--xla_gpu_pipeline_{name}=on" for name in _PIPELINED)
    return modes if _accepts(modes) else tuple(f"--xla_gpu_enable_pipelined_{name}=true" for name in _PIPELINED)


def _names(given: str) -> set[str]:
    """Names of the flags in an XLA_FLAGS; of a switch that became a mode, the mode's."""
    return {_name(flag) for flag in given.split()}


def _name(flag: str) -> str:
    return flag.partition("=")[0].replace("_enable_pipelined_", "_pipeline_")


def compile_options(devices: int, deterministic: bool) -> dict[str, bool | str]:
    """:func:`flags` of a GPU run for one compilation (``Lowered.compile``), without those that XLA_FLAGS names.

    For a process whose own XLA has started already, and for another machine than this: jaxreason.plan.
    """
    given = _names(os.environ.get("XLA_FLAGS", ""))
    wanted = [flag for flag in flags("gpu", devices, deterministic) if _name(flag) not in given]
    values: dict[str, bool | str] = {"true": True, "false": False, "on": "COLLECTIVE_PIPELINING_MODE_ON"}
    pairs = [flag.removeprefix("--").split("=") for flag in wanted]
    return {name: values.get(value, value) for name, value in pairs}


def unknown(names: tuple[str, ...]) -> list[str]:
    """Those of the flags that the installed XLA does not know, found in processes that may die of them."""
    if not names or _accepts(names):
        return []
    return [flag for flag in names if not _accepts((flag,))]


@functools.cache
def _accepts(some: tuple[str, ...]) -> bool:
    # jaxlib's CPU client parses the same table as the GPU plugin of its version, in half a second and without a device.
    code = "from jaxlib import xla_client; xla_client.make_cpu_client()"
    environment = {**os.environ, "XLA_FLAGS": " ".join(some), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode and len(some) == 1 and "Flag parsing failed" in done.stderr:
        raise UserError(f"XLA_FLAGS: the installed XLA knows {some[0].partition('=')[0]}, but not with this value: {some[0]}")
    if done.returncode and not any(said in done.stderr for said in ("Unknown flag", "Flag parsing failed")):
        raise UserError(f"XLA does not start with the flags {' '.join(some)}: {done.stderr.strip()[-500:]}")
    return not done.returncode


def configure(platform: Literal["cpu", "gpu"], devices: int = 1, deterministic: bool = False) -> dict[str, str]:
    """Sets the process up and returns what was set; what the user's environment says already wins.

    Args:
      platform: what the run will use.
      devices: over all hosts.
      deterministic: the same bits from the same inputs on the same GPU, at some cost in speed.

    Raises: UserError if the installed XLA does not know a flag, naming it.
    """
    import jax

    given = os.environ.get("XLA_FLAGS", "").split()
    named = _names(" ".join(given))
    wanted = tuple(flag for flag in flags(platform, devices, deterministic) if _name(flag) not in named)
    if strange := unknown((*wanted, *given)):
        ours = [flag for flag in strange if flag in wanted]
        fix = f"this jaxlib is another than jaxreason was made for: {ours}" if ours else "remove it from XLA_FLAGS"
        raise UserError(f"the installed XLA does not know {', '.join(strange)}; {fix}")
    chosen: dict[str, str] = {}
    if platform == "gpu":
        chosen |= {name: os.environ[name] for name in _FRACTION_NAMES if name in os.environ} or {
            _FRACTION_NAMES[0]: MEMORY_FRACTION
        }
        jax.config.update("jax_compiler_enable_remat_pass", False)
    if wanted or given:
        chosen["XLA_FLAGS"] = " ".join((*given, *wanted))
    os.environ.update(chosen)
    chosen["jax_compilation_cache_dir"] = str(cache_dir())
    jax.config.update("jax_compilation_cache_dir", chosen["jax_compilation_cache_dir"])
    return chosen


def cache_dir() -> Path:
    """Where compiled programs are kept: ``$JAX_COMPILATION_CACHE_DIR``, or below ``$JAXREASON_CACHE``."""
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(given)
    return expanded(os.environ.get("JAXREASON_CACHE") or "~/.cache/jaxreason", "JAXREASON_CACHE, or by default") / "xla"


_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_DRIVER = ("/proc/driver/nvidia", "/dev/dxg")  # the second: Windows' subsystem for Linux


def detect() -> Literal["cpu", "gpu"]:
    """What jax will use by default, without starting it: a GPU if its plugin and a driver are here."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked:
        return "gpu" if asked.split(",")[0] in ("cuda", "gpu") else "cpu"
    return "gpu" if _has_cuda_plugin() and _has_driver() else "cpu"


_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"
_HUGE = "glibc.malloc.hugetlb"


def start_with_huge_pages() -> None:
    """Starts this process again with huge pages, once, where the kernel gives them to those who ask; else does nothing.

    For a CPU: XLA takes a program's memory from the kernel at every call and gives it back. In pages of 4 KiB that is 68,000
    faults in a training step of the 1M model at 32 x 256 tokens, and a tenth of its time. glibc reads what asks for
    2 MiB only when a process starts. The user's own word on it wins; a process under a debugger, or one that was started for
    something else (a notebook that runs the script), stays as it is.
    """
    given = os.environ.get(_TUNABLES, "")
    stays = _HUGE in given or sys.gettrace() is not None or sys.argv[0] not in sys.orig_argv
    if stays or machine.libc_ver()[0] != "glibc" or not _PAGES.exists() or "[madvise]" not in _PAGES.read_text():
        return
    os.environ[_TUNABLES] = f"{given}:{_HUGE}=1".lstrip(":")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def leave_out_absent_gpu() -> None:
    """Keeps jax from looking for a GPU where CUDA's plugin is installed, as the extra ``plan`` does, and no driver is.

    Its search would end in a stack trace. Where another accelerator's plugin is, or the user named platforms, nothing
    is changed.
    """
    import jax

    others = [plugin.name for plugin in entry_points(group="jax_plugins") if "cuda" not in plugin.name]
    if _has_cuda_plugin() and not (_has_driver() or others or find_spec("libtpu") or os.environ.get("JAX_PLATFORMS")):
        jax.config.update("jax_platforms", "cpu")


def _has_cuda_plugin() -> bool:
    return any(find_spec(name) for name in _CUDA_PLUGINS)


def _has_driver() -> bool:
    return any(Path(path).exists() for path in _DRIVER)
