"""A job that is started to be watched: when each line of its output came, which processes belong to it, its end.

The processes of a job are those that have its mark in their environment, whoever their parent is by now: nobody else's
is ever killed, and when the job is over nothing of it is left.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mpipar.errors import LaunchError
from mpipar.launch.processes import environment

_MARK = "MPIPAR_WATCHED"
_LOOK_S = 0.001

# Folders of a job's own, by the variable that names each, and where it is.
_LEFT_BEHIND = {"TMPDIR": None, "OMPI_MCA_btl_sm_backing_directory": "/dev/shm"}


class Line(NamedTuple):
    """A line of a job's output.

    Args:
        at: When it came, by time.monotonic().
        text: Without its end.
    """

    at: float
    text: str


class Watched:
    """A job, from `with` to its end. Then its processes are killed, those that have lost their parents too.

    Args:
        command: What to start.
        env: Variables, besides those of this process.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
        self.command = list(command)
        self._env = dict(env or {})
        self._mark = secrets.token_hex(8)
        self._undo = contextlib.ExitStack()
        self._looked = 0  # lines
        self.lines: list[Line] = []

    def __enter__(self) -> Watched:
        with contextlib.ExitStack() as undo:
            # What is killed leaves files of MPI's behind.
            places = {name: undo.enter_context(_folder(where)) for name, where in _LEFT_BEHIND.items()}
            self._process = subprocess.Popen(
                self.command,
                env={**os.environ, **self._env, **places, _MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for us: it ends the job from here
            )
            undo.callback(self._end)
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    @property
    def is_over(self) -> bool:
        """Whether what was started has ended, and all it has said is here."""
        return self._process.poll() is not None and not self._reader.is_alive()

    @property
    def code(self) -> int | None:
        """The exit code of what was started; None as long as it has not ended."""
        return self._process.poll()

    def wait_for(self, wanted: Callable[[str], bool], timeout_s: float) -> Line | None:
        """The next line like this, behind the one that was waited for last.

        Returns:
            The line; None if it does not come in time, or the job ends without it.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            is_over = self.is_over  # before looking: what it says last counts
            while self._looked < len(self.lines):
                self._looked += 1
                if wanted(self.lines[self._looked - 1].text):
                    return self.lines[self._looked - 1]
            if is_over or time.monotonic() > deadline:
                return None
            time.sleep(_LOOK_S)

    def expect(self, pattern: str, timeout_s: float) -> Line:
        """The next line that begins like this.

        Raises:
            LaunchError: It does not come.
        """
        line = self.wait_for(lambda text: re.match(pattern, text) is not None, timeout_s)
        if line is None:
            said = "\n".join(line.text for line in self.lines[-20:])
            raise LaunchError(f"a job did not say {pattern!r}: {shlex.join(self.command)}\n{said}")
        return line

    def ranks(self, variable: str) -> dict[int, int]:
        """Process by rank, of those that are alive: the processes with this variable, which holds the rank."""
        found = {}
        for process, environ in self._processes().items():
            rank = environ.get(variable, "")
            if rank.isdecimal():
                found[int(rank)] = process
        return found

    def kill(self) -> None:
        """SIGKILL to all processes of the job, as when the power fails."""
        everything = self._processes()
        for process in everything:
            _send(process, signal.SIGSTOP)  # nobody notices the death of another, and tidies up or starts it again
        for process in everything:
            _send(process, signal.SIGKILL)

    def _end(self) -> None:
        while self._processes():
            self.kill()
            self._process.poll()
            time.sleep(0.01)
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                # mpirun sometimes puts a NUL before what a rank has written.
                self.lines.append(Line(time.monotonic(), line.replace("\0", "").rstrip("\n")))

    def _processes(self) -> dict[int, dict[str, str]]:
        """The environment of each process of the job that is alive."""
        processes = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        environments = {process: environment(process) for process in processes}
        return {process: variables for process, variables in environments.items() if variables.get(_MARK) == self._mark}


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _folder(where: str | None) -> tempfile.TemporaryDirectory[str]:
    """A folder that is gone in the end; elsewhere, if it cannot be there."""
    usable = where is not None and os.access(where, os.W_OK)
    return tempfile.TemporaryDirectory(dir=where if usable else None, ignore_cleanup_errors=True)
