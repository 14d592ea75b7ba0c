"""MFU and memory by hand on a device that is not here; which steps a trace holds."""

import jax
import numpy as np
import pytest
from helpers import sft_words

from jaxreason import cli, targets
from jaxreason.errors import UserError
from jaxreason.model import PRESETS
from jaxreason.train.measure import Meter, Trace, segment_lengths

LLAMA_3B = PRESETS["llama3.2-3b"]
H100 = "NVIDIA H100 80GB HBM3"  # as the driver calls it


class Device:
    def __init__(self, kind: str, peak_gib: float | None):
        self.device_kind, self._peak = kind, peak_gib

    def memory_stats(self):
        return None if self._peak is None else {"peak_bytes_in_use": int(self._peak * 2**30)}


def test_mfu_of_packed_rows_by_hand():
    meter = Meter(LLAMA_3B, [Device(H100, 60.0), Device(H100, 61.5)])
    # 6 x 3,212,574,720 for the weights and 6 x 28 layers x 3072 x sum s^2 / sum s for attention, over two peaks
    work = 8192 * 6 * 3_212_574_720 + 6 * 28 * 3072 * (6144**2 + 2048**2)
    found = meter(np.array([6144, 2048]), seconds=2.0, passes=3.0)
    assert found["mfu"] == pytest.approx(3 * work / (2.0 * 2 * 989.4e12))
    assert found["memory_peak_gib"] == 61.5


def test_no_number_where_nothing_is_known():
    assert Meter(LLAMA_3B, [Device("NVIDIA H100 PCIe", 1.0)])(np.array([8]), 1.0) == {"memory_peak_gib": 1.0}
    assert set(Meter(LLAMA_3B, [Device(H100, 1.0)])(np.zeros(0, int), 1.0)) == {"memory_peak_gib"}
    assert Meter(LLAMA_3B, jax.devices("cpu"))(np.array([8]), 1.0) == {}


def test_every_target_is_found_by_its_driver_s_name():
    assert [targets.find(targets.load(name).name) for name in targets.names()] == [targets.load(n) for n in targets.names()]
    assert targets.find(H100).bf16_flops_per_s == 989.4e12 and targets.find("cpu") is None


def test_segment_lengths_leave_padding_out():
    ids = np.array([[1, 1, 2, 0], [1, 2, 2, 2], [0, 0, 0, 0], [3, 3, 1, 0]])
    assert sorted(segment_lengths(ids)) == [1, 1, 1, 2, 2, 3]
    assert len(segment_lengths(np.zeros((2, 3), int))) == 0


@pytest.mark.parametrize(
    ("first", "last", "calls"),
    [
        (1, 6, [(2, "start"), (3, "stop")]),
        (3, 6, [(3, "start"), (3, "stop")]),  # resumed in the middle
        (4, 6, []),  # resumed behind it
        (1, 2, [(2, "start"), (2, "close")]),  # stopped in the middle
    ],
)
def test_a_trace_holds_its_steps(monkeypatch, tmp_path, first, last, calls):
    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: said.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("stop"))
    trace, found = Trace(tmp_path, [2, 3], total=6), []

    def note(step, name=None):
        found.extend((step, name or word) for word in said)
        said.clear()

    for step in range(first, last + 1):
        trace.before(step)
        note(step)
        trace.after(step)
        note(step)
    trace.close()
    note(last, "close")
    assert found == calls


def test_a_run_writes_its_trace(tmp_path):
    words = ["--config", "sft", *sft_words(tmp_path, "train.steps=3")]
    assert cli.train([*words, "train.profile_steps=[2,3]"]) == 0
    assert list((tmp_path / "sft" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("steps", "part"),
    [("[3,2]", "write [first, last]"), ("[1]", "at least 2 items"), ("[0,1]", "greater than or equal to 1"),
     ("[2,4]", "the run has 3 steps")],
)  # fmt: skip
def test_steps_that_cannot_be_traced_are_refused(steps, part, tmp_path, capsys):
    assert cli.train(["--config", "sft", *sft_words(tmp_path, "train.steps=3"), f"train.profile_steps={steps}"]) == 2
    error = capsys.readouterr().err
    assert part in error and "train.profile_steps" in error and not (tmp_path / "sft").exists()


def test_no_trace_needs_no_steps(tmp_path):
    Trace(tmp_path, None, total=1).before(1)
    with pytest.raises(UserError, match=r"\[2, 3\]: the run has 2 steps"):
        Trace(tmp_path, [2, 3], total=2)
