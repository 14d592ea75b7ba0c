"""metrics.jsonl and what a person sees while a run works."""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

from jaxreason import config as cfg
from jaxreason.terminal import bars, console, seconds
from jaxreason.train.sinks import sinks

_HEARTBEAT = 10.0  # seconds between lines where there is no terminal to draw a bar on


class Log:
    """metrics.jsonl, a progress bar with ETA (or heartbeat lines), and the sinks that were asked for.

    ``shown``: metrics of the progress line, in order, with what they are called there.
    """

    def __init__(self, folder: Path, config: cfg.RunConfig, total: int, start: int, shown: Mapping[str, str]):
        self._primary = jax.process_index() == 0
        self._shown, self._total = shown, total
        path = folder / "metrics.jsonl"
        self._at, self._last = _newest(path) or (0, (start, {}))
        self._file = open(path, "a") if self._primary else None
        self._sinks = sinks(folder, config, start) if self._primary else []
        self._started, self._spoke, self._first = time.monotonic(), 0.0, start
        self._live = self._primary and console.is_terminal
        self._seen: dict[str, float] = {}  # the newest value of each shown metric
        if self._live:
            self._task = bars.add("step", total, start)

    def write(self, step: int, record: dict[str, float]) -> None:
        """One object a step."""
        if self._file is None:
            return
        self._last, self._at = (step, record), self._file.tell()
        self._put(self._file, record)
        for sink in self._sinks:
            sink(step, record)
        self._show(step, record)

    @property
    def record(self) -> dict[str, float]:
        """The newest line, also where an earlier start of the run wrote it."""
        return self._last[1]

    def amend(self, found: dict[str, float]) -> None:
        """Adds what was measured after the newest line was written: to that line, and to what people see."""
        if self._file is None or not found:
            return
        step, record = self._last
        self._file.truncate(self._at)
        self._last = (step, record | found)
        self._put(self._file, record | found)
        for sink in self._sinks:
            sink(step, found)
        self._spoke = 0.0
        self._show(step, record | found)

    def _put(self, file: TextIO, record: dict[str, float]) -> None:
        file.write(json.dumps({"step": self._last[0], **{k: _number(v) for k, v in record.items()}}) + "\n")
        file.flush()

    def _show(self, step: int, record: dict[str, float]) -> None:
        self._seen |= {name: record[name] for name in self._shown if name in record}
        text = " ".join(f"{self._shown[name]} {_short(self._seen[name])}" for name in self._shown if name in self._seen)
        if self._live:
            bars.update(self._task, step, text)
        now = time.monotonic()
        if not self._live and (now - self._spoke > _HEARTBEAT or step == self._total):
            done = step - self._first
            eta = seconds((now - self._started) / done * (self._total - step)) if done else "unknown"
            console.print(f"step {step}/{self._total} eta {eta} {text}")
            self._spoke = now

    def close(self) -> None:
        with contextlib.ExitStack() as last:
            if self._file:
                last.callback(self._file.close)
            for sink in self._sinks:
                last.callback(sink.close)
            if self._live:
                last.callback(bars.end, self._task, stays=True)


def _newest(path: Path) -> tuple[int, tuple[int, dict]] | None:
    """Where the last line of a metrics file begins, its step and its record."""
    written = path.read_bytes() if path.is_file() else b""
    if not written:
        return None
    at = written.rstrip(b"\n").rfind(b"\n") + 1
    record = json.loads(written[at:])
    return at, (record.pop("step"), record)


def _number(value: Any) -> Any:
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    value = float(value)
    return value if math.isfinite(value) else repr(value)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
