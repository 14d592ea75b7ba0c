"""Programs that are compiled before they are needed, and what compiling took in this process."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
from jax.sharding import Mesh

from jaxreason.terminal import Working


class Ahead:
    """A jitted function that a thread compiles for arguments known as shapes, while the run does something else.

    The first call waits for it. Arguments have the structure, shapes and shardings of ``abstract``; there is no second
    compilation for others. What compiling raises is raised by the first call.
    """

    def __init__(self, jitted: jax.stages.Wrapped, mesh: Mesh, *abstract: Any):
        self._mesh, self._compiled = mesh, Future[Callable]()

        def work() -> None:
            try:
                with jax.set_mesh(mesh):
                    self._compiled.set_result(jitted.lower(*abstract).compile())
            except BaseException as error:  # handed to the caller, whatever it is
                self._compiled.set_exception(error)

        threading.Thread(target=work, name="compile").start()

    def __call__(self, *args: Any) -> Any:
        if self._compiled.done():
            compiled = self._compiled.result()
        else:
            with Working("compiling", 1, "the update"):
                compiled = self._compiled.result()
        with jax.set_mesh(self._mesh):
            return compiled(*args)


class Compilations:
    """Programs that this process compiled since the last :meth:`take`, those that the cache had included."""

    def __init__(self) -> None:
        self._count, self._cached, self._seconds = 0, 0, 0.0
        self._lock = threading.Lock()  # threads compile side by side
        jax.monitoring.register_event_duration_secs_listener(self._timed)
        jax.monitoring.register_event_listener(self._seen)

    def _timed(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:
                self._count, self._seconds = self._count + 1, self._seconds + duration_secs

    def _seen(self, event: str, **_: Any) -> None:
        with self._lock:
            self._cached += event == "/jax/compilation_cache/cache_hits"

    def take(self) -> dict[str, float]:
        """Their number, how many of them the cache had, and seconds, which may have passed side by side; then zero."""
        with self._lock:
            found = {"compilations": self._count, "compilations_cached": self._cached, "compile_seconds": self._seconds}
            self._count, self._cached, self._seconds = 0, 0, 0.0
        return found


compilations = Compilations()
