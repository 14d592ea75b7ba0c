"""Grading in worker processes with a hard time limit: a grader that hangs or crashes costs one sample."""

import collections
import contextlib
import dataclasses
import math
import time
import weakref
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import connection as mp_connection
from typing import Literal

import numpy as np

from jaxreason.errors import UserError
from jaxreason.processes import Process
from jaxreason.rewards.registry import Reward
from jaxreason.rewards.sample import Sample
from jaxreason.rewards.worker import Kind, Outcome, call

START_LIMIT_S = 120.0
"""A worker that has not loaded its functions by then will not: its imports hang."""
MAX_CHUNK = 16
"""Calls sent to a worker at once: enough to hide the round trip, few enough to share the work evenly."""


@dataclasses.dataclass(frozen=True)
class GradeError:
    """One call that gave no reward because it failed."""

    function: str
    sample: int
    kind: Kind
    message: str

    def __str__(self) -> str:
        return f"reward {self.function!r}, sample {self.sample}: {self.kind}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Graded:
    """The rewards of n samples by F functions."""

    names: tuple[str, ...]  # [F]
    rewards: np.ndarray  # [n, F] float64, NaN where the function had no reward or failed
    total: list[float | None]  # [n] weighted sums, see RewardPool
    errors: list[GradeError]  # ordered by sample, then function
    extras: list[dict[str, np.ndarray]]  # [n] by name: [tokens] float32; a sample with an error may lack some
    seconds: float

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For each function, how many samples it rewarded, had no reward for, and failed on."""
        failed = collections.Counter(error.function for error in self.errors)
        finite = np.isfinite(self.rewards).sum(axis=0)
        return {
            name: {"rewarded": int(k), "none": len(self.rewards) - int(k) - failed[name], "failed": failed[name]}
            for name, k in zip(self.names, finite)
        }


@dataclasses.dataclass(frozen=True)
class _Call:
    function: int
    samples: tuple[int, ...]


class RewardPool:
    """Grades samples with weighted reward functions in worker processes.

    A sample's total is the sum of weight x reward over the functions that had a reward for it. It is None where no
    function had one, and where any function failed: with a term missing it would not compare with its group's others,
    and an error is not a 0. Results do not depend on which worker did what.

    Each call of a function has ``timeout_s`` seconds of wall-clock time, a batch function for its whole list. A worker
    past that is killed with every process it started, and replaced. Workers are fresh interpreters that run neither the
    main module nor jax (``JAX_PLATFORMS=cpu`` keeps a custom function's jax off the accelerator); what functions print
    goes to standard error; functions should keep no state between calls. Close the pool, or use it in a ``with``.

    Args:
      functions: pairs of ``registry.get(...)`` and its weight; names must differ.
      workers: processes; 0 grades in this one, without any limit of time or memory, and a crash is the run's.
      timeout_s: the limit of one call in seconds.
      on_error: ``count`` goes on and lists errors in ``Graded.errors``; ``stop`` raises UserError at the first one.
      memory_gib: address space of a worker (Linux only), past which a call raises MemoryError; None for no limit.
    Raises UserError for arguments that cannot be used, or if a worker cannot load a function.
    """

    def __init__(
        self,
        functions: Sequence[tuple[Reward, float]],
        workers: int,
        timeout_s: float,
        on_error: Literal["count", "stop"],
        memory_gib: float | None = 8.0,
    ):
        if not functions:
            raise UserError("no reward function is given; name at least one, such as accuracy")
        names = [reward.name for reward, _ in functions]
        if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
            raise UserError(f"reward {twice[0]!r} is given twice; give it once, with the sum of the weights")
        filled: dict[str, str] = {}
        for reward, weight in functions:
            for name in reward.fills:
                if filled.setdefault(name, reward.name) != reward.name:
                    raise UserError(f"extras[{name!r}] is filled by reward {filled[name]!r} and by {reward.name!r}; keep one")
            if not math.isfinite(weight):
                raise UserError(f"reward {reward.name!r}: weight is {weight}; it must be finite")
        if workers < 0 or not (math.isfinite(timeout_s) and timeout_s > 0):
            raise UserError(f"reward workers is {workers} and timeout_s {timeout_s}; they must be >= 0 and > 0")
        if on_error not in ("count", "stop"):
            raise UserError(f"reward on_error is {on_error!r}; it is count or stop")
        self.names = tuple(names)
        self._rewards = [reward for reward, _ in functions]
        self._weights = [float(weight) for _, weight in functions]
        self._stop = on_error == "stop"
        self._timeout_s = timeout_s
        targets = [(reward.target, dict(reward.options)) for reward in self._rewards]
        self._setup = (targets, timeout_s, memory_gib)
        self._workers: list[_Worker] = []
        # Started here, not at the first call: they load while the caller compiles.
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)
        self._workers.extend(_Worker(self._setup) for _ in range(workers))

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every worker; to be called twice is harmless."""
        self._finalizer()

    def grade(self, samples: Sequence[Sample]) -> Graded:
        """Every function's reward for every sample. Raises UserError as ``on_error`` says, or for a function's own."""
        if not self._finalizer.alive:
            raise ValueError("the reward pool is closed")
        start = time.perf_counter()
        rewards = np.full((len(samples), len(self.names)), np.nan)
        extras: list[dict[str, np.ndarray]] = [{} for _ in samples]
        errors = []
        with contextlib.closing(self._outcomes(samples)) as outcomes:
            for item, results in outcomes:
                for sample, (kind, value, filled) in zip(item.samples, results, strict=True):
                    if kind != "reward":
                        errors.append((sample, item.function, kind, str(value)))
                        if self._stop:
                            raise UserError(str(self._error(*errors[-1])))
                        continue
                    extras[sample] |= {name: np.array(values, np.float32) for name, values in filled.items()}
                    if value is not None:
                        rewards[sample, item.function] = value
        failed = {sample for sample, *_ in errors}
        total = [None if i in failed else self._total(row) for i, row in enumerate(rewards)]
        records = [self._error(*error) for error in sorted(errors, key=lambda error: error[:2])]
        return Graded(self.names, rewards, total, records, extras, time.perf_counter() - start)

    def _total(self, row: np.ndarray) -> float | None:
        terms = [weight * value for weight, value in zip(self._weights, row.tolist()) if not math.isnan(value)]
        return sum(terms) if terms else None

    def _error(self, sample: int, function: int, kind: Kind, message: str) -> GradeError:
        return GradeError(self.names[function], sample, kind, message)

    def _outcomes(self, samples: Sequence[Sample]) -> Generator[tuple[_Call, list[Outcome]], None, None]:
        calls = []
        if samples:
            calls += [_Call(f, tuple(range(len(samples)))) for f, r in enumerate(self._rewards) if r.batch]
            # By sample, so that a chunk's calls share one copy of it.
            calls += [_Call(f, (i,)) for i in range(len(samples)) for f, r in enumerate(self._rewards) if not r.batch]
        if self._workers:
            return self._in_workers(calls, samples)
        return ((item, call(self._rewards[item.function], [samples[i] for i in item.samples])) for item in calls)

    def _in_workers(
        self, calls: list[_Call], samples: Sequence[Sample]
    ) -> Generator[tuple[_Call, list[Outcome]], None, None]:
        queue = collections.deque(calls)
        chunk = max(1, min(MAX_CHUNK, len(calls) // (4 * len(self._workers))))
        try:
            while queue or any(worker.calls for worker in self._workers):
                for worker in self._workers:
                    # An idle worker that has something to say is dead: it is heard, and replaced, below.
                    if queue and worker.ready and not worker.calls and not worker.connection.poll():
                        taken = [queue.popleft() for _ in range(min(chunk, len(queue)))]
                        worker.send(taken, samples, self._timeout_s)
                deadline = min(worker.deadline for worker in self._workers)
                live = {worker.connection: worker for worker in self._workers}
                # A minute at most: poll counts milliseconds in a C int, which a generous limit overflows.
                heard = mp_connection.wait(live, min(max(0.0, deadline - time.monotonic()), 60.0))
                for connection, worker in live.items():
                    # A reply that came while this process was busy elsewhere was in time: only silence is late.
                    if connection in heard:
                        yield from self._hear(worker, queue)
                    elif time.monotonic() >= worker.deadline and not connection.poll():
                        yield from self._lose(worker, queue, timed_out=True)
        finally:
            for worker in self._workers:  # left before the end: what they still compute is nobody's
                if worker.calls:
                    self._replace(worker)

    def _hear(self, worker: "_Worker", queue: collections.deque) -> Iterator[tuple[_Call, list[Outcome]]]:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            yield from self._lose(worker, queue, timed_out=False)
            return
        if isinstance(message, tuple):
            state, text = message
            if state != "ready":
                raise UserError(text if state == "stop" else f"a reward worker cannot start: {text}")
            worker.ready, worker.deadline = True, math.inf
            return
        item = worker.calls.popleft()
        worker.deadline = time.monotonic() + self._timeout_s if worker.calls else math.inf
        yield item, message

    def _lose(
        self, worker: "_Worker", queue: collections.deque, timed_out: bool
    ) -> Iterator[tuple[_Call, list[Outcome]]]:
        """Replaces a worker that is late or gone: its first open call is at fault, the others return to the queue."""
        if not worker.ready:
            end = f"it took more than {START_LIMIT_S:.0f} s" if timed_out else worker.kill()
            raise UserError(f"a reward worker cannot start: {end}")
        end = self._replace(worker)
        if worker.calls:  # else it died idle, at no sample's cost
            item, *others = worker.calls
            queue.extendleft(reversed(others))
            late = Outcome("timeout", f"took more than {self._timeout_s} s")
            yield item, [late if timed_out else Outcome("crashed", end)] * len(item.samples)

    def _replace(self, worker: "_Worker") -> str:
        end = worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._setup)
        return end


class _Worker:
    """A worker process: ``calls`` are sent and unanswered, the first of them is running until ``deadline``."""

    def __init__(self, setup: tuple):
        self._process = Process("jaxreason.rewards.worker", {"JAX_PLATFORMS": "cpu"})
        self.connection, self.kill = self._process.connection, self._process.kill
        self.calls: collections.deque[_Call] = collections.deque()
        self.ready = False
        self.deadline = time.monotonic() + START_LIMIT_S
        self._post(setup)

    def send(self, calls: list[_Call], samples: Sequence[Sample], timeout_s: float) -> None:
        self.calls.extend(calls)
        self._post([(item.function, [samples[i] for i in item.samples]) for item in calls])
        self.deadline = time.monotonic() + timeout_s

    def _post(self, message: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # recv tells that it died
            self.connection.send(message)


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    workers.clear()
