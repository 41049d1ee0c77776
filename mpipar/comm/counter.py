"""A counter that the processes of a host share, and that survives the death of whoever holds it.

The kernel frees a file lock with the process that has it, whatever becomes of that; a lock in shared memory, or an MPI
window, would stay locked. Between two writes a holder can leave the counter one too high: what it has claimed dies with
it.
"""

from __future__ import annotations

import fcntl
import mmap

_WORDS = 2  # epoch, next


class Counter:
    """Counts from 0 in each epoch.

    Args:
        descriptor: Of memory that all its processes share, `NUM_BYTES`, zero at first.
    """

    NUM_BYTES = _WORDS * 8

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._words = memoryview(mmap.mmap(descriptor, self.NUM_BYTES)).cast("Q")

    def claim(self, epoch: int) -> int:
        """The next number of this epoch: nobody else gets it. The first claim of a new epoch begins it.

        Args:
            epoch: At least 1. Nobody may claim in an earlier one any more.
        """
        words = self._words
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            number = words[1] if words[0] == epoch else 0
            words[1] = number + 1
            words[0] = epoch
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
        return number
