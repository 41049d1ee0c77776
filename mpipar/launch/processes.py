"""The processes that stem from this one. Linux only, as is all that supervises here.

A process whose parent dies is handed to init, where nobody would find it. A subreaper gets it instead: so whatever a
job has started, however it has detached itself, still descends from the supervisor and can be ended by it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_LIBC = ctypes.CDLL(None, use_errno=True)

# How long the kernel may take to end processes that were killed; one that waits for a dead file server does not end.
_DYING_S = 10.0

SHARED_MEMORY = Path("/dev/shm")


def adopt_orphans() -> None:
    """Makes this process the parent of all orphans among its descendants."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with(parent: int) -> None:
    """Has this process asked to end when its parent dies. For a child, before it becomes another program."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has died already
        os.kill(os.getpid(), signal.SIGTERM)


def descendants(ancestor: int) -> list[int]:
    """The processes that stem from another and have not ended, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # it has ended meanwhile
                continue
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry.name))
    found = list(children.get(ancestor, []))
    for pid in found:  # which grows
        found += children.get(pid, [])
    return found


def end_descendants() -> list[int]:
    """Kills all that stems from this process, and reaps it. Returns what does not die."""
    deadline = time.monotonic() + _DYING_S
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            _kill(pid)
        _reap()
        time.sleep(0.01)
    _reap()
    return left


def environment(pid: int) -> dict[str, str]:
    """The variables with which a process was started; none if it has ended."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}


def shared_files(names: Iterable[str], pids: Iterable[int]) -> set[str]:
    """Those of the files in /dev/shm that one of these processes has mapped."""
    mapped: set[str] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            continue
        mapped.update(line.rpartition(f"{SHARED_MEMORY}/")[2] for line in lines if f"{SHARED_MEMORY}/" in line)
    return mapped & set(names)


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return
