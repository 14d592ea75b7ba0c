"""A request to stop, from a signal, that all processes of a run follow after the same step."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax

from jaxreason.train import hosts


class Stopped(BaseException):
    """What was under way is left, because the run was told to stop. Not an Exception: nothing that fails may swallow it."""


class Interrupt:
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop after the current step.

    Of several processes one alone may be told (a spot host that goes away), and all must stop after the same step, since
    the checkpoint is collective. They exchange one number a step, where the step's metrics have just brought them
    together: 5 ms over gloo on two busy cores. jax's own protocol (``multihost_utils.reached_preemption_sync_point``) costs
    nothing, but its C++ handler of SIGTERM and this one exclude each other, it knows no Ctrl-C, and it swallows a SIGTERM
    that comes before there is anything to save; so ``jaxreason.distributed`` switches it off.
    """

    def __init__(self):
        self.requested = self._leaves = False
        self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def agreed(self) -> bool:
        """Whether any process was asked, so that all of them stop after the same step; one number a step is exchanged."""
        return hosts.largest(int(self.requested)) > 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if self._leaves:
            self._leaves = False
            raise Stopped

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Work that a request to stop leaves at once, by raising Stopped: an evaluation, which may take longer than the
        time that a scheduler gives.

        Of a run of several processes it is finished: one that left alone would not be where the others meet.
        """
        self._leaves = jax.process_count() == 1
        try:
            if self._leaves and self.requested:
                raise Stopped
            yield
        finally:
            self._leaves = False

    def restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
