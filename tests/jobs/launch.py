"""Starting whole jobs, and ending them as a cluster would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mpipar.programs import find_program

ROOT = Path(__file__).parents[2]

TIME_LIMIT_S = 50.0

NOT_BEGUN = "The PMIx server's listener thread failed to start"
"""What Open MPI's launcher says, once in a thousand starts, before it has started anything."""

MARK = "MPIPAR_TEST"
"""An environment variable by which the processes of a test can be told from others. All inherit it."""


class Job:
    """`mpirun -n N python ARGUMENTS...`, started. Its output is read as it comes.

    Args:
        num_ranks: Ranks; 0 runs the program without mpirun.
        arguments: What follows `python`.
        options: Of mpirun.
    """

    def __init__(self, num_ranks: int, *arguments: str, options: Sequence[str] = ()):
        launcher = [mpirun(), *options, "-n", str(num_ranks)] if num_ranks else []
        self.process = subprocess.Popen(
            [*launcher, sys.executable, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def finish(self, time_limit_s: float = TIME_LIMIT_S) -> Outcome:
        """Waits for the end. A job that does not end is killed, and fails the test."""
        try:
            code = self.process.wait(time_limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the job did not end within {time_limit_s:.0f} s:\n{self.text}") from None
        self._reader.join()
        assert not self.process.stdout or self.process.stdout.closed
        return Outcome(code, self.output)

    def wait_for(self, text: str, time_limit_s: float = TIME_LIMIT_S) -> None:
        """Waits until a line of the output contains `text`."""
        deadline = time.monotonic() + time_limit_s
        while not any(text in line for line in self.output):
            assert self.process.poll() is None, f"the job ended before it said {text!r}:\n{self.text}"
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.text}"
            time.sleep(0.01)

    def ranks(self) -> list[int]:
        """The process ids of the ranks, in the order of their ranks."""
        found = self.processes()
        return [found[rank] for rank in sorted(found)]

    def processes(self) -> dict[int, int]:
        """The process ids of those ranks that are there, by rank."""
        found: dict[int, int] = {}
        for pid in descendants(self.process.pid):
            try:
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for entry in environ:
                if entry.startswith((b"PMIX_RANK=", b"PMI_RANK=")):
                    found[int(entry.partition(b"=")[2])] = pid
        return found

    def kill(self) -> None:
        """SIGKILL to everything: launcher and ranks, as when the power of a host fails."""
        everything = [self.process.pid, *descendants(self.process.pid)]
        for pid in everything:
            _kill(pid, signal.SIGSTOP)  # nobody notices the death of another, and tidies up
        for pid in reversed(everything):
            _kill(pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()

    @property
    def text(self) -> str:
        return "".join(self.output)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                self.output.append(line.replace("\0", ""))  # which mpirun sometimes puts before a rank's stderr


class Outcome:
    """What a job left on the screen.

    Args:
        code: The exit code.
        output: Its lines, stdout and stderr.
    """

    def __init__(self, code: int, output: Sequence[str]):
        self.code = code
        self.lines = [line.rstrip("\n") for line in output]
        self.text = "".join(output)

    def ok(self) -> Outcome:
        """The job succeeded."""
        assert self.code == 0, self.text
        return self

    def refused(self, *fragments: str) -> Outcome:
        """The job failed with one message, which has these fragments, and no traceback."""
        assert self.code != 0, self.text
        assert "Traceback" not in self.text, self.text
        messages = [line for line in self.lines if line.lstrip().startswith("mpipar:")]
        assert len(messages) == 1, self.text
        for fragment in fragments:
            assert fragment in messages[0], messages[0]
        return self


def run(num_ranks: int, *arguments: str) -> Outcome:
    """Runs a job to its end; once more if it has not even begun."""
    outcome = Job(num_ranks, *arguments).finish()
    return Job(num_ranks, *arguments).finish() if NOT_BEGUN in outcome.text else outcome


def mpirun() -> str:
    """The launcher of this environment: beside its Python, or else the first on the PATH."""
    found = find_program("mpirun")
    assert found, "there is no mpirun"
    return found


def descendants(pid: int) -> list[int]:
    """The processes that stem from a process, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        generation = children.get(queue.pop(0), [])
        found += generation
        queue += generation
    return found


def marked(mark: str) -> list[int]:
    """The processes that a test has started with this mark in `MARK`; zombies have none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # it has ended
                continue
    return found


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
