"""GPUs: facts from the YAML files beside this one, and the description of a GPU that XLA compiles for without having it."""

import dataclasses
from pathlib import Path

import yaml

from jaxreason.errors import UserError

_FOLDER = Path(__file__).parent
_USABLE = 0.92  # of the card's memory: jaxreason.xla's memory fraction
_RESERVED = 2 * 2**30  # CUDA context, NCCL buffers, graphs and fragmentation, which no compiler reports


@dataclasses.dataclass(frozen=True)
class Rates:
    """What kernels reach of a card's limits: ``jaxreason.plan.timing`` predicts seconds with it."""

    kernel_seconds: float  # of any kernel, in addition to its work
    bandwidth: float  # of memory_bytes_per_s: copies, conversions and additions
    elementwise: float  # of memory_bytes_per_s: norms, activations, sums, the optimizer
    product: float  # of bf16_flops_per_s: a matrix product of full tiles
    product_depth: float  # elements of depth whose time each tile of a product loses
    product_bandwidth: float  # of memory_bytes_per_s: a product that waits for its operands
    attention_forward: float  # of bf16_flops_per_s: causal products of cuDNN's attention
    attention_backward: float
    attention_tokens: float  # what a token costs in addition to those that it attends to
    decode_bandwidth: float  # of memory_bytes_per_s: attention of a decoding step


@dataclasses.dataclass(frozen=True)
class Target:
    name: str
    capability: float
    accelerated: bool  # the architecture's own instructions, e.g. sm_90a
    memory_bytes: int
    memory_bytes_per_s: float
    bf16_flops_per_s: float  # dense
    nvlink_bytes_per_s: float  # one way, of one GPU
    network_bytes_per_s: float  # one way, of one GPU, between hosts
    host_bytes_per_s: float  # between the card and pinned host memory, one way
    usd_per_hour: float
    cores: int
    fpus_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    threads_per_core: int
    rates: Rates
    rates_measured_on: str  # the target whose measurements they are

    @property
    def limit_bytes(self) -> int:
        """What a program may take: 0.92 of the card less 2 GiB; 70.8 GiB of an H100's 79.1."""
        return int(_USABLE * self.memory_bytes) - _RESERVED

    def proto(self) -> str:
        """XLA's ``GpuTargetConfigProto`` in text form."""
        major, minor = divmod(round(10 * self.capability), 10)
        features = "ACCELERATED_FEATURES" if self.accelerated else "NONE"
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {self.threads_per_core}
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared_memory_per_core}
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  core_count: {self.cores}  fpus_per_core: {self.fpus_per_core}  clock_rate_ghz: {self.clock_ghz}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: {int(self.memory_bytes_per_s)}  l2_cache_size: {self.l2_bytes}
  device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"  name: "{self.name}"
  runtime_version: "13.0.0"  driver_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.name}"
"""


def names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find(device_kind: str) -> Target | None:
    """The target that the driver calls ``device_kind``, or None: a PCIe card of the same name has other limits."""
    return next((found for found in map(load, names()) if found.name == device_kind), None)


def load(name: str) -> Target:
    """The target called ``name``. Raises UserError with the known names."""
    path = _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"--target {name}: unknown; one of {', '.join(names())}, or add {path}")
    facts = yaml.safe_load(path.read_text())
    measured = name if "rates" in facts else "h100"
    rates = facts.pop("rates", None) or yaml.safe_load((_FOLDER / f"{measured}.yaml").read_text())["rates"]
    return Target(**facts, rates=Rates(**rates), rates_measured_on=measured)
