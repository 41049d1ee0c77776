"""Files that are open for reading, not more of them at a time than there is room for.

A read is a `pread`: readers share no position in the file and need no lock, and a process that forks may read on both
sides. A read costs what a memory map costs, but a file that was truncated is an error and not a SIGBUS.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from collections import deque
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from mpipar.errors import DamagedError, DataError
from mpipar.storage.advice import will_be_read

BYTE = np.dtype(np.uint8)

RESTORE = "Restore it from a copy, or write it again"

_MOST_OPEN = 2048


class OpenFile:
    """One open file. It is closed when nobody holds it any more.

    Raises:
        DataError: It cannot be opened.
    """

    __slots__ = ("_descriptor", "asked", "num_bytes", "path")

    def __init__(self, path: Path):
        self._descriptor = -1
        self.path = path
        self.asked = False
        """Set by whoever reads: for `OpenFiles`, which clears it."""
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror}") from error
        self.num_bytes = status.st_size

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, begin: int, end: int, dtype: np.dtype[Any] = BYTE) -> np.ndarray[Any, Any]:
        """Bytes begin..end as a new one-dimensional array. Raises DataError if they are not there."""
        array = np.empty((end - begin) // dtype.itemsize, dtype)
        self.read_into(array, begin)
        return array

    def read_into(self, array: np.ndarray[Any, Any], begin: int) -> None:
        """Fills an array that lies in one piece with the bytes from `begin` on."""
        try:
            count = os.preadv(self._descriptor, (array,), begin)  # type: ignore[arg-type]  # any buffer
            while count < array.nbytes:
                missing = array.reshape(-1).view(BYTE)[count:]
                more = os.preadv(self._descriptor, (missing.data,), begin + count)
                if more == 0:
                    raise DamagedError(
                        f"{self.path}: ends at byte {begin + count:,}, where {missing.size:,} more were expected: it "
                        "was truncated",
                        RESTORE,
                    )
                count += more
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read at byte {begin:,}: {error.strerror}") from error

    def expect(self, begin: int, num_bytes: int) -> None:
        """Asks the system to fetch bytes that are needed soon."""
        will_be_read(self._descriptor, begin, num_bytes)


Opened = TypeVar("Opened", bound=OpenFile)


class CanOpen(Protocol[Opened]):
    """What opens itself, and says what of it is open.

    `held` is for `OpenFiles` to set. Who reads takes it from there, which costs nothing, and sets its `asked`; where
    there is none, it asks `OpenFiles.open`.
    """

    held: Opened | None

    def open(self) -> Opened:
        """Opens it anew."""
        ...


class OpenFiles(Generic[Opened]):
    """What is open: at most `limit` of them; for one more, one that was not asked for lately is let go.

    In the order in which they were opened, but what was asked for since it was last its turn has another turn
    ("second chance"): nearly what was not asked for for longest, and an access only sets a flag.

    Safe to use from several threads: what one lets go, another may read to its end.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._queue: deque[CanOpen[Opened]] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        return len(self._queue)

    def open(self, what: CanOpen[Opened]) -> Opened:
        """What is open of it; it is opened if nothing is."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{what} was closed")
            if what.held is None:
                opened = what.open()
                while len(self._queue) >= self._limit:
                    self._pass_on()
                self._queue.append(what)
                what.held = opened
            return what.held

    def close(self) -> None:
        """Lets go of all. Nothing can be opened from here on."""
        with self._lock:
            self._closed = True
            while self._queue:
                self._queue.popleft().held = None

    def _pass_on(self) -> None:
        """Lets go of the one whose turn it is, or gives it another turn."""
        what = self._queue.popleft()
        assert what.held is not None
        if what.held.asked:
            what.held.asked = False
            self._queue.append(what)
        else:
            what.held = None


def room_for_files() -> int:
    """How many files may well be open at a time: 2,048, or a quarter of what the process may have, where that is less.

    What it may have is raised for that, as far as the system lets it: the usual 1,024 are for programs that call
    select(), which knows no more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * _MOST_OPEN
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _MOST_OPEN if soft == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, soft // 4))
