"""Stopping on a signal: Ctrl-C and SIGTERM ask the training loop to save and exit."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

SAME_STOP = 10.0  # seconds


class GracefulExit:
    """Notes the first SIGINT or SIGTERM; the loop asks for it after every step.

    Signals within SAME_STOP seconds of the first are the same stop: SLURM and torchrun each send one, and a terminal
    sends one to every process. A later one ends the process at once. The handler does nothing else: what it interrupts
    may be a print or a save.

    signal: the number of the first signal, 0 before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.signal, self.clock, self.since = 0, clock, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    @property
    def requested(self) -> bool:
        """Whether the loop is to save and exit."""
        return self.signal > 0

    def _receive(self, number: int, _: Any) -> None:
        if not self.signal:
            self.signal, self.since = number, self.clock()
        elif self.clock() - self.since > SAME_STOP:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
