"""Memory of one process that others on its host open.

It has no name in any file system, so it is gone when the last process is, however that one ends, and a container's
small /dev/shm is no limit. Neighbours open it through /proc, and look at the random name that it got when it was made:
ranks in containers of their own may find some other process under the number that they were given, or none.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

Exchange = Callable[[Any], list[Any]]
"""Gives every rank of some the objects of all, by rank."""


class Segment(NamedTuple):
    """Memory that is open in this process: a descriptor of it, and the memory."""

    descriptor: int
    memory: mmap.mmap


class Handle(NamedTuple):
    """Where another process finds a segment, and how it knows that it is the right one."""

    process: int
    descriptor: int
    name: str


def open_segments(exchange: Exchange, num_bytes: int, *, brings: bool = True) -> list[Segment] | str:
    """Collective: the segments of those ranks that bring one, by rank, or on all ranks the reason why there are none.

    Args:
        exchange: Between the ranks of the host.
        num_bytes: The size of each segment. It is zeros.
        brings: Whether this rank brings one.
    """
    with ExitStack() as own, ExitStack() as opened:
        mine: Handle | str | None = None
        try:
            if brings:
                mine = _create(num_bytes)
                own.callback(os.close, mine.descriptor)  # this process too opens it once more
        except OSError as error:
            mine = f"{num_bytes:,} bytes of shared memory cannot be had: {error.strerror}"
        handles: list[Handle | str | None] = exchange(mine)
        problem = next((text for text in handles if isinstance(text, str)), None)
        segments: list[Segment] = []
        try:
            for handle in handles:
                if isinstance(handle, Handle) and problem is None:
                    segments.append(_open(handle, num_bytes))
                    opened.callback(os.close, segments[-1].descriptor)
        except (OSError, ValueError) as error:  # ValueError: the neighbour's segment is smaller
            problem = f"a neighbour's memory cannot be opened: {getattr(error, 'strerror', None) or error}"
        problems: list[str | None] = exchange(problem)
        for text in problems:
            if text is not None:
                return text
        opened.pop_all()
        return segments


def _create(num_bytes: int) -> Handle:
    """New memory, reserved as a whole: else touching more than there is would be a SIGBUS."""
    name = f"mpipar-{secrets.token_hex(16)}"
    descriptor = os.memfd_create(name)
    try:
        os.posix_fallocate(descriptor, 0, max(num_bytes, 1))
    except OSError:
        os.close(descriptor)
        raise
    return Handle(os.getpid(), descriptor, name)


def _open(handle: Handle, num_bytes: int) -> Segment:
    """A segment of another rank, or of this one."""
    descriptor = os.open(f"/proc/{handle.process}/fd/{handle.descriptor}", os.O_RDWR)
    try:
        if handle.name not in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ESRCH, "it is not the neighbour's")
        return Segment(descriptor, mmap.mmap(descriptor, max(num_bytes, 1)))
    except (OSError, ValueError):
        os.close(descriptor)
        raise
