"""What a run measures of its devices: model FLOPs utilisation, memory high-water, traces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxreason import targets
from jaxreason.errors import UserError
from jaxreason.model import ModelConfig
from jaxreason.model.flops import train_flops_per_token


class Meter:
    """``mfu`` and ``memory_peak_gib`` of this process's devices, where the devices let them be known.

    ``mfu`` = FLOPs of the tokens trained (``model.flops``: attention to the own segment, no padding, nothing recomputed)
    / (seconds · Σ dense bf16 peak of the devices); without it where ``jaxreason/targets`` has no such device.
    ``memory_peak_gib`` is the most that any device had allocated since the process started; a CPU keeps no such count.
    """

    def __init__(self, model: ModelConfig, devices: Sequence[Any]):
        self._model, self._devices = model, devices
        found = targets.find(devices[0].device_kind)
        self._peak = found.bf16_flops_per_s * len(devices) if found else None

    def __call__(self, lengths: np.ndarray, seconds: float, passes: float = 1.0) -> dict[str, float]:
        """Metrics of work on this process's segments of ``lengths`` tokens, each trained ``passes`` times."""
        metrics = {}
        if self._peak and len(lengths):
            flops = train_flops_per_token(self._model, lengths) * float(np.sum(lengths)) * passes
            metrics["mfu"] = flops / (seconds * self._peak)
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in self._devices]
        known = [peak for peak in peaks if peak is not None]
        if len(known) == len(peaks):
            metrics["memory_peak_gib"] = max(known) / 2**30
        return metrics


def segment_lengths(segment_ids: np.ndarray) -> np.ndarray:
    """Tokens of every segment of rows [B, T]; segment 0 is padding."""
    rows = np.arange(len(segment_ids))[:, None] * (int(segment_ids.max(initial=0)) + 1)
    _, counts = np.unique((segment_ids + rows)[segment_ids > 0], return_counts=True)
    return counts


class Trace:
    """XLA's trace of steps first..last, both in it, in ``folder``: for TensorBoard's profile plugin, XProf or Perfetto.

    Only process 0 traces, its own devices. A run that resumes between first and last traces the rest, and one that
    resumes after last does nothing. Raises UserError for steps that the run does not have.
    """

    def __init__(self, folder: Path, steps: list[int] | None, total: int):
        if steps and steps[1] > total:
            raise UserError(f"train.profile_steps {steps}: the run has {total} steps; choose from 1 to {total}")
        self._folder, self._steps, self._running = folder, steps, False

    def before(self, step: int) -> None:
        """To be called before each step's first work."""
        if self._steps and jax.process_index() == 0 and not self._running and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int) -> None:
        """To be called once a step's results are on the host."""
        if self._running and self._steps and step == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Writes what was traced, also where the run stops before ``last``."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
