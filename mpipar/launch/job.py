"""One start of the command: mpirun, and all processes that stem from it, from the first to the last."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mpipar.launch.processes import (
    SHARED_MEMORY,
    descendants,
    end_descendants,
    end_with,
    environment,
    shared_files,
)

# mpirun ends its ranks, on other hosts too, a quarter of a second after it is asked.
_ENDING_S = 5.0

# What a launcher tells a rank: its number, and how many ranks there are on its host. Open MPI, Hydra.
_RANK = ("PMIX_RANK", "PMI_RANK")
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Here:
    """The ranks on this host.

    Args:
        alive: How many are alive.
        started: How many mpirun has started; 0 as long as none has been seen.
    """

    alive: int = 0
    started: int = 0


class Job:
    """A running job. Its output is that of this process.

    Args:
        command: The command line, which begins with mpirun.
        environ: Its environment.
        prepare: For mpirun, before it becomes that program.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], prepare: Callable[[], None]):
        self._shared_before = set(os.listdir(SHARED_MEMORY))
        self._shared: set[str] = set()
        self._started = 0
        parent = os.getpid()

        def become_mpirun() -> None:
            prepare()
            end_with(parent)

        # A session of its own: Ctrl-C in the terminal is for the supervisor, which ends the job from here.
        self._mpirun = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=become_mpirun
        )

    def is_running(self) -> bool:
        return self._mpirun.poll() is None

    @property
    def exit_code(self) -> int:
        """That of mpirun, as a shell gives it; for a job that is over."""
        code = self._mpirun.returncode
        return 128 - code if code < 0 else code

    def ask_to_stop(self) -> None:
        """Has the ranks save and leave. mpirun passes the signal on to them; of SIGTERM they would die."""
        self._mpirun.send_signal(signal.SIGUSR1)

    def look(self) -> Here:
        """Counts the ranks on this host. Files of theirs in /dev/shm are noted: later nobody could tell."""
        pids = descendants(self._mpirun.pid)  # not what a rank has left behind, which is no rank and is ours by now
        new = set(os.listdir(SHARED_MEMORY)) - self._shared_before - self._shared
        if new:
            self._shared |= shared_files(new, pids)
        environments = [environment(pid) for pid in pids]
        alive = {variables[name] for variables in environments for name in _RANK if name in variables}
        said = [int(variables[name]) for variables in environments for name in _LOCAL_RANKS if name in variables]
        self._started = max([self._started, *said])
        return Here(len(alive), self._started)

    def end(self) -> list[int]:
        """Ends what is left of the job, mpirun first: it knows the other hosts. Returns what does not die."""
        if self.is_running():
            self._mpirun.terminate()
            try:
                self._mpirun.wait(_ENDING_S)
            except subprocess.TimeoutExpired:
                self._mpirun.kill()
                self._mpirun.wait()
        stubborn = end_descendants()
        for name in self._shared:
            (SHARED_MEMORY / name).unlink(missing_ok=True)
        return stubborn
