"""The watchdog of a host: a small process that ends ranks which hang, so that the others can go on without them.

A rank writes into memory that it shares with the watchdog when it was last seen alive (`Pulse`). One that has given no
sign for too long, or has been stopped for as long, is killed: as a dead rank it can be survived, as a hanging one it
cannot. The watchdog lives as long as any of its ranks.

    for each rank    | process | last sign of life, ns of the monotonic clock; 0 while it may be silent |

It runs as a program of its own and imports nothing of mpipar: it must not hang where ranks do.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WORDS = 2  # of a rank


class Pulse:
    """A rank's signs of life.

    Args:
        words: Those of this rank; None if nobody watches.
    """

    def __init__(self, words: memoryview | None = None):
        self._words = words
        if words is not None:
            words[0] = os.getpid()
            self.beat()

    def beat(self) -> None:
        """This rank is alive."""
        if self._words is not None:
            self._words[1] = time.monotonic_ns()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Around what may take long without a sign of life: waiting for others, writing a file."""
        if self._words is not None:
            self._words[1] = 0
        try:
            yield
        finally:
            self.beat()


class Watch:
    """What the ranks of a host share with their watchdog.

    Args:
        descriptor: Of the memory, zeros at first.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._words = memoryview(mmap.mmap(descriptor, 0)).cast("Q")

    @staticmethod
    def num_bytes(num_ranks: int) -> int:
        """Of the memory for so many ranks."""
        return num_ranks * _WORDS * 8

    def pulse(self, rank: int) -> Pulse:
        """Of the rank of this number on the host."""
        return Pulse(self._words[rank * _WORDS : (rank + 1) * _WORDS])

    def start(self, timeout_s: float) -> None:
        """Starts the watchdog. It outlives this process if others of the host do."""
        subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self._descriptor), str(timeout_s)],
            pass_fds=(self._descriptor,),
            env={},  # it is no rank, and nobody shall take it for one
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def watch(words: memoryview, timeout_s: float) -> None:
    """Kills what hangs, until no rank is left."""
    pause_s = min(timeout_s / 10, 0.5)  # it is to be gone soon after the ranks are
    moved: dict[int, float] = {}  # by process: when it was last seen to run
    signs: dict[int, int] = {}
    looked = time.monotonic()
    while True:
        time.sleep(pause_s)
        now = time.monotonic()
        if now - looked > timeout_s / 2:  # the watchdog itself was stopped: so was everything else
            moved.clear()
        looked = now
        states = {process: _state(process) for process in words[::_WORDS] if process}
        alive = {process for process, state in states.items() if state}
        if states and not alive:
            return
        suspended = all(states[process] == "T" for process in alive)  # by a user: the job, not a rank
        for process, sign in zip(words[::_WORDS], words[1::_WORDS], strict=True):
            silent = sign == signs.get(process) and sign != 0
            if suspended or not (silent or states.get(process) == "T"):
                moved[process] = now
            signs[process] = sign
            if process in alive and now - moved.setdefault(process, now) > timeout_s:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


def _state(process: int) -> str:
    """R, S, D, T as the kernel has it; empty for one that is dead."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if state in "ZX" else state


if __name__ == "__main__":
    watch(memoryview(mmap.mmap(int(sys.argv[1]), 0)).cast("Q"), float(sys.argv[2]))
