"""Ends a process whose steps no longer end: a crash is seen and tried again, a hang is not."""

from __future__ import annotations

import faulthandler
import time

FIRST = 4
"""Times the declared seconds that the first step may take."""


class Watchdog:
    """Writes every thread's stack to stderr and ends the process when no step has ended for ``seconds``.

    The first step, with data to open and a program to compile, has ``FIRST`` times as long. By Python's
    ``faulthandler``, whose thread runs while the interpreter is stuck in a call, such as a collective.
    """

    def __init__(self, seconds: float):
        self.seconds, self.armed = seconds, 0.0

    def step_ended(self) -> None:
        """To be called after every step; costs a look at the clock."""
        if self.seconds and time.monotonic() - self.armed > min(1.0, self.seconds / 10):
            faulthandler.dump_traceback_later(self.seconds, exit=True)
            self.armed = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.seconds:
            faulthandler.dump_traceback_later(FIRST * self.seconds, exit=True)
        return self

    def __exit__(self, *exc) -> None:
        faulthandler.cancel_dump_traceback_later()
