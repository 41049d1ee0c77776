"""A deadline for calls of MPI that have none, and cannot be taken back: when time is up the process ends.

For what is done once or seldom: making communicators, voting. All else is waited for in `progress`, which can say who
is missing.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mpipar.comm.mpi import MPI


@contextmanager
def deadline(timeout_s: float, call: str) -> Iterator[None]:
    """Around a call in which MPI waits for other ranks. It lets other threads run meanwhile.

    Args:
        timeout_s: How long it may take.
        call: Its name, and what it is for.
    """

    message = (
        f"mpipar: error: rank {MPI.COMM_WORLD.rank} waited {timeout_s:.0f} s in {call}: another did not come to it, or "
        "the network is down. Look at the output of the ranks; --comm.timeout-s makes the wait longer"
    )

    def give_up() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
