"""What the system is told of bytes of a file. It is advice: where nobody listens, as on macOS, only time is lost."""

from __future__ import annotations

import os
from contextlib import suppress


def will_be_read(descriptor: int, begin: int, num_bytes: int) -> None:
    """Has the disk fetch bytes that are needed soon."""
    _advise(descriptor, begin, num_bytes, "POSIX_FADV_WILLNEED")


def will_not_be_read(descriptor: int, begin: int, num_bytes: int) -> None:
    """Has the disk begin with what was written, which else waits for the flush.

    Linux does so when it is told that the bytes are not needed; it forgets none before they are on the disk.
    """
    _advise(descriptor, begin, num_bytes, "POSIX_FADV_DONTNEED")


def _advise(descriptor: int, begin: int, num_bytes: int, what: str) -> None:
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, begin, num_bytes, getattr(os, what))
