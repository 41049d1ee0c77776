"""Files that are open for reading, not more of them at a time than there is room for.

A read is a `pread`: readers share no position in the file and need no lock, and a process that forks may read on both
sides. A read costs what a memory map costs, but a file that was truncated is an error and not a SIGBUS.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import numpy as np

from mpipar.errors import DataError

BYTE = np.dtype(np.uint8)


class OpenFile:
    """One open file. It is closed when nobody holds it any more.

    Raises:
        DataError: It cannot be opened.
    """

    _descriptor = -1

    def __init__(self, path: Path):
        self.path = path
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
        end = begin + array.nbytes
        missing: Any = array
        while begin < end:
            try:
                count = os.preadv(self._descriptor, [missing], begin)
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read at byte {begin:,}: {error.strerror}") from error
            if count == 0:
                raise DataError(
                    f"{self.path}: ends at byte {begin:,}, where {end - begin:,} more were expected: it was truncated. "
                    "Restore it from a copy, or write it again"
                )
            begin += count
            if begin < end:
                missing = array.reshape(-1).view(BYTE)[begin - end :]

    def expect(self, begin: int, num_bytes: int) -> None:
        """Asks the system to fetch bytes that are needed soon."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, begin, num_bytes, os.POSIX_FADV_WILLNEED)


Opened = TypeVar("Opened", covariant=True)


class CanOpen(Protocol[Opened]):
    """What opens itself. It is told from others by its hash, of its identity by default."""

    def __hash__(self) -> int: ...

    def open(self) -> Opened:
        """Opens it anew."""
        ...


class OpenFiles(Generic[Opened]):
    """What is open: at most `limit` of them; for one more, the one that was not asked for for longest is let go.

    Safe to use from several threads: what one lets go, another may read to its end.
    """

    def __init__(self, limit: int):
        self._opened = lru_cache(maxsize=limit)(_open)
        self.get: Callable[[CanOpen[Opened]], Opened] = self._opened
        """What is open; it is opened if it is not."""

    def __len__(self) -> int:
        return self._opened.cache_info().currsize

    def close(self) -> None:
        """Lets go of all. Nothing can be opened from here on."""
        self.get = _refuse
        self._opened.cache_clear()


def room_for_files() -> int:
    """How many files may well be open at a time: 512, or a quarter of what the process may have, where that is less."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if soft == resource.RLIM_INFINITY else max(1, min(512, soft // 4))


def _open(what: CanOpen[Opened]) -> Opened:
    return what.open()


def _refuse(what: object) -> NoReturn:
    raise ValueError(f"{what} was closed")
