"""Kills a process before each file-system call that it makes, one call after the other.

A crash test runs itself as a program (`python -m tests.single.test_...`): a fresh process without threads, in which
`crash_everywhere` may fork. The children die by SIGKILL, so no `finally` and no `atexit` of theirs ever runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

CALLS = ("open", "posix_fallocate", "ftruncate", "pwrite", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


def crash_everywhere(action: Callable[[], object], check: Callable[[], object]) -> int:
    """Runs `action` in children killed before their 1st, 2nd, ... call, `check` here after each. Returns how many."""
    for point in count():
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _arm(point)
                action()
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        check()
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "the action failed by itself"
            return point
    raise AssertionError


def run_as_program(module: str, *arguments: str) -> int:
    """Runs a test module as a program and returns the number that it printed."""
    command = [sys.executable, "-W", "error", "-m", module, *arguments]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads and fork do not go together
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def _arm(point: int) -> None:
    remaining = point

    def deadly(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal remaining
            if remaining == 0:
                if name == "pwrite":  # half of it reaches the file
                    call(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            remaining -= 1
            return call(*args, **kwargs)

        return step

    for name in CALLS:
        setattr(os, name, deadly(name))
