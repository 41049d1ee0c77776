"""What the commands beside the questions share: one message for what cannot be, and an orderly end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

from mpipar.errors import LaunchError, MpiparError
from mpipar.programs import find_program

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a command to end."""


def run_command(run: Callable[[], int | None]) -> int:
    """Runs a command, and returns its exit code: what it returns, or 0; or that of an error, which is one message."""
    try:
        return run() or 0
    except MpiparError as error:
        print(f"mpipar: error: {error}", file=sys.stderr)
        return error.exit_code


def leave_when_asked() -> None:
    """For commands whose jobs would outlive them: signals lead through the end of every `with`."""
    for number in ENDING:
        signal.signal(number, _leave)


def path_of(name: str) -> str:
    """The path of a program of this environment.

    Raises:
        LaunchError: There is none.
    """
    found = find_program(name)
    if found is None:
        raise LaunchError(f"there is no {name}")
    return found


def trainer(settings: Mapping[str, object]) -> list[str]:
    """The command of a rank that trains, with settings by name, as in "run.log-every"."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "mpipar.train", *flags]


def _leave(number: int, _: object) -> NoReturn:
    """Leaves as the shell expects it of a signal."""
    raise SystemExit(128 + number)
