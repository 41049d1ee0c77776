"""Being asked to stop.

This module imports nothing heavy: a signal that comes while torch is still being imported, or MPI starts, must find its
handler, or it kills the job.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class StopRequest:
    """Set by SIGTERM or SIGUSR1. It takes effect at the end of a step, on all ranks at the same one."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    @contextmanager
    def told(self, tell: Callable[[signal.Signals], None]) -> Iterator[None]:
        """While the block lasts, has `tell` called when a signal comes, SIGINT too, in a thread of its own.

        That is at once, where a handler waits for what the main thread computes: after Ctrl-C mpirun (Open MPI 5) sends
        its ranks SIGTERM, and kills them a quarter of a second later. For the main thread only.
        """
        heard, rung = os.pipe()
        os.set_blocking(rung, False)
        before = signal.set_wakeup_fd(rung, warn_on_full_buffer=False)
        thread = threading.Thread(target=_listen, args=(heard, tell), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(rung)
            thread.join()
            os.close(heard)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def _listen(heard: int, tell: Callable[[signal.Signals], None]) -> None:
    while numbers := os.read(heard, 1):
        with suppress(OSError):  # mpirun, which was to pass it on, may be gone
            tell(signal.Signals(numbers[0]))
