"""The folders of a supervisor, which go with it: also with one that was killed.

    BELOW/mpipar-launch-x8a2f0q1       what its starts report
    TMPDIR/mpipar-launch-x8a2f0q1      MPI's small files; the same folder, unless hosts need one that all of them see
    /dev/shm/mpipar-launch-x8a2f0q1    MPI's shared memory

In each lies a file that the supervisor has locked. The kernel takes the lock away with the process, however it ends, so
nobody has to trust a process number, which may be another's by now. The next supervisor removes what dead ones left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mpipar.errors import ConfigError
from mpipar.launch.processes import SHARED_MEMORY

_KIND = "mpipar-launch-"
_OWNER = ".owner"


class Folders:
    """Those of this process.

    Args:
        below: Where to make the one for reports; None for the place of temporary files.

    Attributes:
        reports: For what starts report. Its name is that of all three, and no other job's.
        files: For small files of MPI.
        shared_memory: For its shared memory.

    Raises:
        ConfigError: One cannot be made.
    """

    def __init__(self, below: Path | None):
        self._locks: dict[Path, int | None] = {}
        try:
            self.reports = Path(tempfile.mkdtemp(prefix=_KIND, dir=below)).absolute()
        except OSError as error:
            raise ConfigError(f"no folder can be made in --scratch {below}: {error.strerror}") from error
        self.files = Path(tempfile.gettempdir(), self.reports.name).absolute()
        self.shared_memory = SHARED_MEMORY / self.reports.name
        for folder in (self.reports, self.files, self.shared_memory):
            if folder in self._locks:
                continue
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                self._locks[folder] = _own(folder)
            except OSError as error:
                self.remove()
                raise ConfigError(f"{folder} cannot be made: {error.strerror}") from error

    def remove(self) -> None:
        """Removes them with all that is in them."""
        for folder in {self.reports, *self._locks}:
            _remove(folder, self._locks.get(folder))


def remove_dead(below: Path | None) -> list[str]:
    """Removes the folders of this user's supervisors that were killed on this host.

    Those that have no lock stay: they are another version's, or on a file system without locks.

    Args:
        below: As for `Folders`.

    Returns:
        Their names, which they also have on other hosts.
    """
    temporary = Path(tempfile.gettempdir())
    places = {(below or temporary).absolute(), temporary.absolute(), SHARED_MEMORY}
    found = sorted(folder for place in places for folder in place.glob(f"{_KIND}*"))
    return sorted({folder.name for folder in found if _remove_if_dead(folder)})


def removal_script(names: Iterable[str]) -> str:
    """Removes what MPI has left on another host in folders of these names."""
    places = (Path(tempfile.gettempdir()), SHARED_MEMORY)
    return shlex.join(["rm", "-rf", *(str(place / name) for name in names for place in places)])


def _own(folder: Path) -> int | None:
    """Marks a folder as this process's. Returns the lock; None if the file system has none."""
    mark = folder / f"{_OWNER}-new"
    lock = os.open(mark, os.O_RDWR | os.O_CREAT, 0o600)
    os.write(lock, socket.gethostname().encode())
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    mark.rename(folder / _OWNER)  # only now: nobody finds it unlocked while we live
    return lock


def _remove_if_dead(folder: Path) -> bool:
    try:
        lock = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # not one of ours, or somebody else's
        return False
    try:
        # On a file system that hosts share, some keep locks of their own: here nothing is known of another host.
        ours = os.fstat(lock).st_uid == os.getuid() and os.read(lock, 300) == socket.gethostname().encode()
        if ours:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its owner lives
        ours = False
    if not ours:
        os.close(lock)
        return False
    _remove(folder, lock)
    return True


def _remove(folder: Path, lock: int | None) -> None:
    """The mark goes last: where this process is killed meanwhile, the next one finds what is left."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name == _OWNER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # it stays, and with it the folder
                entry.unlink()
    if lock is not None:
        os.close(lock)  # before its file is removed, which NFS would keep as long as it is open
    shutil.rmtree(folder, ignore_errors=True)
