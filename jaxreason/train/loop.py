"""What every training loop has around its steps: folder, resume, log, interrupt, trace, checkpoints, evaluation, summary.

A loop is then its own steps and nothing else:

    with Loop(folder, config, plan, meter) as loop:
        state, data = loop.restore(abstract, fresh, base)
        for step in loop:
            state, metrics = train_step(state, batch)
            loop.end(state, loop.fetch(metrics, state, batch) | {...}, data_state)
        return loop.finish()
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

import jax

from jaxreason import config as cfg
from jaxreason.errors import UserError
from jaxreason.model import ModelConfig, param_count
from jaxreason.terminal import Working, console
from jaxreason.train import hosts, not_finite, worse
from jaxreason.train.ahead import compilations
from jaxreason.train.folder import RunFolder
from jaxreason.train.interrupt import Interrupt, Stopped
from jaxreason.train.log import Log
from jaxreason.train.measure import Trace
from jaxreason.types import Batch, TrainState

Evaluate = Callable[[TrainState], dict[str, float]]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Span:
    """How long a run is, and what of it is shown."""

    total: int  # steps of the loop
    updates: int  # optimizer updates in one of them
    shown: Mapping[str, str]  # metrics of the progress line, in order, with what they are called there

    @property
    def all_updates(self) -> int:
        """Optimizer updates of the whole run, over which a schedule goes."""
        return self.total * self.updates


class Loop:
    """The frame of one run.

    Args:
      folder: the run's; ``folder.resume`` says where it goes on.
      model: the architecture, for checkpoints and the summary.
      evaluate: what is measured of a state every ``train.eval_every`` steps and at the end; None: nothing.
      evaluate_first: also before the first step, as step 0.
    """

    def __init__(
        self, folder: RunFolder, config: cfg.RunConfig, span: Span, model: ModelConfig, evaluate: Evaluate | None = None,
        evaluate_first: bool = False,
    ):  # fmt: skip
        self._folder, self._config, self._span, self._model = folder, config, span, model
        self._evaluate, self._evaluate_first = evaluate, evaluate_first
        self._start = 0 if folder.resume is None else folder.resume // span.updates
        self._trace = Trace(folder.path / "profile", config.train.profile_steps, span.total)
        self._counters: dict[str, float] = {"trained_tokens": 0.0, "train_seconds": 0.0}
        self._step, self._stopped, self._unmeasured = self._start, False, False
        if config.train.max_skipped_updates is not None:
            self._counters["skipped_updates"] = 0.0
        self._failed: OSError | UserError | None = None  # what this step could not do, apart from training
        self._spoilt: str | None = None  # why the run ends after this step

    # ---- around the loop

    def __enter__(self) -> "Loop":
        self._folder.start(None if self._folder.resume is None else self._start)
        self._checkpoints = self._folder.saved()
        for path in self._checkpoints.remove_unfinished():
            console.print(f"removed {path}: its writing was cut off, so it was never a checkpoint")
        self._log = Log(self._folder.path, self._config, self._span.total, self._start, self._span.shown)
        self._interrupt = Interrupt()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.ExitStack() as last:  # from the last line to the first, whatever another of them raises
            last.callback(self._folder.release)
            # Whatever happened since, what was being saved is saved whole: the run goes on from there.
            last.callback(self._checkpoints.wait)
            last.callback(self._interrupt.restore)
            last.callback(self._log.close)
            last.callback(self._trace.close)

    def restore(
        self, abstract: TrainState, fresh: Callable[[], TrainState], base: Callable[[dict], dict]
    ) -> tuple[TrainState, Any]:
        """The state to go on from, and the loop's own part of its checkpoint; from ``fresh``, with None, for a new run.

        ``base``: gives what a run's adapters stand beside, of where PiSSA's began.
        """
        if self._folder.resume is None:
            state, data = fresh(), None
        else:
            console.print(f"resuming {self._folder.path} from step {self._start}")
            with Working("checkpoint", 1, "is checked and read"):
                state, saved = self._checkpoints.restore(self._folder.resume, abstract, base if self._model.adapter else None)
            data = saved["data"]
            self._counters |= saved["counters"]
        if self._start == 0 and self._evaluate_first and (found := self._measured(state)):
            self._log.write(0, found)
        if self._start and self._due(self._start) and hosts.largest(int(self._lacks_evaluation())):
            self._log.amend(self._measured(state))  # it was saved, and then its evaluation failed or was left
        self._clock = time.monotonic()
        return state, data

    # ---- one step

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps that are left, until the last or until the run is told to stop."""
        for step in range(self._start + 1, self._span.total + 1):
            if self._stopped:
                return
            self._step = step
            self._trace.before(step)
            yield step

    def fetch(self, metrics: dict, state: TrainState, batch: Batch) -> dict[str, float]:
        """A train step's metrics on the host, with their gradient norms by parameter checked and left out.

        A maximum or minimum over nothing is left out too. Where the loss or a gradient is not finite ``batch`` is kept; a run
        that skips such updates then gets the metrics of one that trained nothing, any other raises UserError.
        """
        found = jax.device_get(metrics)
        if not not_finite.is_finite(found):
            return self._spoiled(found, state, batch)
        del found["leaf_norms"]
        return {
            name: float(value)
            for name, value in found.items()
            if not (name.endswith(("_max", "_min")) and math.isinf(value))
        }

    def _spoiled(self, metrics: dict, state: TrainState, batch: Batch) -> dict[str, float]:
        """What :meth:`fetch` does with an update that is not finite: raises UserError, or counts it as skipped."""
        most, update = self._config.train.max_skipped_updates, int(state.step)
        self.note(not_finite.save, self._folder.path, update, batch)
        text = f"step {self._step}: {not_finite.described(metrics, state.params)}"
        look = f"look at its batch: python scripts/replay.py {self._folder.path} --update {update}"
        if most is None:
            raise UserError(
                f"{text}; nothing of this step was saved; lower optimizer.learning_rate or optimizer.max_grad_norm, skip such "
                f"updates (train.max_skipped_updates=10), or {look}"
            )
        self._counters["skipped_updates"] += 1
        count = round(self._counters["skipped_updates"])
        if count > most:
            self._spoilt = (
                f"{text}; it is number {count} of this run, and train.max_skipped_updates is {most}; the step is saved with the "
                f"weights from before it; {look}"
            )
        elif jax.process_index() == 0:
            console.print(f"{text}; skipped ({count} of at most {most}); {look}", markup=False)
        return {"tokens": 0.0, "learning_rate": float(metrics["learning_rate"])}

    def restore_more(self, name: str, abstract: Any) -> Any | None:
        """The tree ``more[name]`` of the checkpoint that the run goes on from; None for a new run. After :meth:`restore`."""
        return None if self._folder.resume is None else self._checkpoints.restore_more(self._folder.resume, name, abstract)

    def note(self, do: Callable[..., T], *what: Any) -> T | None:
        """``do(*what)``: it writes a line of this step, or reads what the next one needs. Where that fails (a full disk, a source
        that is gone), the run is told to stop: :meth:`end` saves the step first, on all processes, and then raises it."""
        try:
            return do(*what)
        except (OSError, UserError) as error:
            self._failed = self._failed or error
            self._interrupt.requested = True
            return None

    def end(
        self, state: TrainState, record: dict[str, float], data: Any, more: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        """Ends a step: log, checkpoint, evaluation, in this order, so that an evaluation that fails loses nothing.

        ``record``: of the step; its ``tokens`` are added up. ``data``: the loop's own part of a checkpoint, plain values;
        ``more``: gives further trees of arrays of it, where one is saved.
        """
        step, every = self._step, self._config.train
        self._trace.after(step)
        now = time.monotonic()
        self._counters["train_seconds"] += now - self._clock
        self._clock = now
        self._counters["trained_tokens"] += record["tokens"] * self._span.updates
        record = record | {name: count for name, count in self._counters.items() if name == "skipped_updates"}
        self.note(self._log.write, step, record)
        self._checkpoints.check()
        self._stopped = self._interrupt.agreed() or step == self._span.total
        saved = {"data": data, "counters": dict(self._counters)}
        if keep := self._stopped or self._spoilt is not None or bool(every.save_every and step % every.save_every == 0):
            self._checkpoints.save(state, saved, self._model, more())
        if self._failed:
            raise self._failed
        if self._spoilt:
            raise UserError(self._spoilt)
        if self._due(step):
            self._log.amend(self._measured(state))
        if self._unmeasured and not keep:
            self._checkpoints.save(state, saved, self._model, more())

    def _due(self, step: int) -> bool:
        """Whether a step's state is evaluated."""
        every = self._config.train.eval_every
        return step == self._span.total or bool(every and step % every == 0)

    def _lacks_evaluation(self) -> bool:
        return not any(name.startswith("eval_") for name in self._log.record)

    def _measured(self, state: TrainState) -> dict[str, float]:
        """What the evaluation finds; nothing without one, and where the run is told to stop meanwhile."""
        if self._evaluate is None:
            return {}
        try:
            with self._interrupt.leaving():
                return self._evaluate(state)
        except Stopped:
            console.print(f"told to stop: the evaluation after step {self._step} is left out")
            self._stopped = self._unmeasured = True
            return {}

    # ---- the end

    def finish(self) -> dict | None:
        """Writes the summary and returns it; None if the run was told to stop before its last step or its evaluation."""
        with Working("checkpoint", 1, "is written"):
            self._checkpoints.wait()
        if self._step < self._span.total or self._unmeasured:
            done = f"stopped at step {self._step} and saved it" if self._step else "stopped before the first step"
            console.print(f"{done}; the same command goes on")
            return None
        lines = self._folder.lines() if jax.process_index() == 0 else []
        first = lines[0] if lines else {"step": -1}
        before = {f"before_{k}": v for k, v in first.items() if k.startswith("eval_accuracy")} if first["step"] == 0 else {}
        summary = {"step": self._span.total, **self._log.record, **self._counters, **compilations.take()}
        summary["parameters"] = param_count(self._model)
        if before:
            summary |= worse.change(first, summary)
            worse.warn(first, summary)
        self._folder.finish(summary | before)
        return summary | before
