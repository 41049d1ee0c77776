"""A file that one process at a time holds: the kernel takes it back when its holder dies, however that comes about."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from pathlib import Path


class FileLock:
    """Held until it is released or this process ends. The file is removed when it is released.

    On a file system without locks, as some cluster file systems are mounted, everybody gets it.
    """

    def __init__(self, path: Path, descriptor: int):
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: str | os.PathLike[str]) -> FileLock | str:
        """The lock, or who has it. Another process than this one: a process gets its own lock as often as it asks.

        Raises:
            OSError: The file cannot be made.
        """
        path = Path(path)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    os.close(descriptor)
                    return holder
            if _is_at(path, descriptor):  # and not removed by its last holder in between
                lock = cls(path, descriptor)
                try:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
                except OSError:  # a full disk
                    lock.release()
                    raise
                return lock
            os.close(descriptor)

    def release(self) -> None:
        """Lets others have it."""
        if _is_at(self._path, self._descriptor):  # its folder may have been moved away
            self._path.unlink()
        os.close(self._descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
