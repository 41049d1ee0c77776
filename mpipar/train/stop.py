"""Being asked to stop.

This module imports nothing heavy: a signal that comes while torch is still being imported, or MPI starts, must find its
handler, or it kills the job.
"""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM or SIGUSR1. It takes effect at the end of a step, on all ranks at the same one."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
