"""A lock that its holder's death gives back, and that leaves no file behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpipar.storage import FileLock

HOLD = "import sys, time; from mpipar.storage import FileLock; print(FileLock.take(sys.argv[1])); time.sleep(60)"


def test_it_is_held_until_its_holder_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-u", "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert "FileLock" in holder.stdout.readline()
        held = FileLock.take(path)
        assert isinstance(held, str)
        assert held.startswith(f"process {holder.pid} on ")
        holder.send_signal(signal.SIGKILL)
    lock = FileLock.take(path)
    assert isinstance(lock, FileLock)
    assert path.read_text().startswith(f"process {os.getpid()} on ")
    lock.release()
    assert not path.exists()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    lock = FileLock.take(tmp_path / "lock")
    assert isinstance(lock, FileLock)
    lock.release()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileLock.take(tmp_path / "missing" / "lock")


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        FileLock.take(tmp_path / "lock")
    assert not list(tmp_path.iterdir())
