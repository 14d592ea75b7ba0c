"""A request to stop, from a signal, that all processes of a run follow after the same step."""

import signal
from types import FrameType

from jaxreason.train import hosts


class Interrupt:
    """Turns SIGTERM and the first Ctrl-C into a request to save and stop after the current step.

    Of several processes one alone may be told (a spot host that goes away), and all must stop after the same step, since
    the checkpoint is collective. They exchange one number a step, where the step's metrics have just brought them
    together: 5 ms over gloo on two busy cores. jax's own protocol (``multihost_utils.reached_preemption_sync_point``) costs
    nothing, but its C++ handler of SIGTERM and this one exclude each other, it knows no Ctrl-C, and it swallows a SIGTERM
    that comes before there is anything to save; so ``jaxreason.distributed`` switches it off.
    """

    def __init__(self):
        self.requested = False
        self._old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def agreed(self) -> bool:
        """Whether any process was asked, so that all of them stop after the same step; one number a step is exchanged."""
        return hosts.largest(int(self.requested)) > 0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
