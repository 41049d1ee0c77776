"""Watching a job to its end, and ending it where it would not end by itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from mpipar.launch.job import Here, Job
from mpipar.launch.requests import Request, Requests
from mpipar.launch.verdict import End
from mpipar.supervised import Sign, read_outcome, read_sign

_LOOK_EVERY_S = 0.2
_COUNT_EVERY_S = 1.0  # which means to walk through all processes of the host

# How long a job that has said how it ended may take to leave: with fault tolerance some never do.
_LEAVING_S = 30.0

# How long the loss of ranks may go without consequences. mpirun and the other ranks need a moment to notice.
_LOSS_S = 10.0


@dataclass(frozen=True)
class Patience:
    """How long to wait for a job.

    Args:
        hang_s: The longest time between two signs of life; 0 for no limit.
        grace_s: How long it may take to save and leave when it is asked to stop.
    """

    hang_s: float
    grace_s: float


class Watch:
    """One job, watched.

    Args:
        job: The job.
        ranks: How many ranks it has.
        folder: What it reports into.
        requests: What the supervisor is asked for.
        patience: How long to wait for it.
    """

    def __init__(self, job: Job, ranks: int, folder: Path, requests: Requests, patience: Patience):
        self._job = job
        self._ranks = ranks
        self._folder = folder
        self._requests = requests
        self._patience = patience
        self._asked: Request | None = None
        self._sign: Sign | None = None
        self._count_due = 0.0
        # Since when: the request to stop, the last sign of life, the outcome, the loss of ranks.
        self._asked_at = self._said_at = self._lost_at = float("inf")
        self._signed_at = time.monotonic()

    def until_the_end(self) -> End:
        """Waits for the end, or brings it about. Then no process of the job is left on this host."""
        how = None
        while how is None and self._job.is_running():
            request = self._requests.wait(_LOOK_EVERY_S)
            now = time.monotonic()
            if request is not None and (request == "interrupt" or self._asked):
                self._asked, how = request, "was ended at once"
            elif request is not None:
                self._asked, self._asked_at = request, now
                self._job.ask_to_stop()
            self._look(now)
            how = how or self._problem(now)
        stubborn = self._job.end()
        if how is None:
            how = f"ended without a word (exit code {self._job.exit_code} of mpirun)"
        if stubborn:
            how += f", leaving processes that cannot be killed: {', '.join(map(str, stubborn))}"
        return End(how, read_outcome(self._folder), self._asked, read_sign(self._folder))

    def _look(self, now: float) -> None:
        """Takes in what there is to see of the job."""
        sign = read_sign(self._folder)
        if sign != self._sign:
            self._sign, self._signed_at = sign, now
        if read_outcome(self._folder) is not None:
            self._said_at = min(self._said_at, now)
        if now >= self._count_due:
            self._count_due = now + _COUNT_EVERY_S
            self._lost_at = min(self._lost_at, now) if self._misses(self._job.look()) else float("inf")

    def _misses(self, here: Here) -> bool:
        """Whether ranks are gone, and nobody else would notice.

        While a job starts with fault tolerance, survivors wait in MPI_Init for a rank that has died before, for ever.
        And mpirun waits for all who hold its ranks' output, when ranks have left others behind. Of ranks on other
        hosts nothing is seen.
        """
        if self._said_at < float("inf"):
            return False
        if self._sign is None:
            return here.alive < here.started
        return here.alive == 0 and here.started == self._ranks

    def _problem(self, now: float) -> str | None:
        """Why the job has to be ended."""
        if now > self._asked_at + self._patience.grace_s:
            return f"did not stop within {self._patience.grace_s:g} s"
        if now > self._said_at + _LEAVING_S:
            return f"did not leave within {_LEAVING_S:g} s of its end"
        if now > self._lost_at + _LOSS_S:
            return "lost ranks, and did not notice"
        if self._patience.hang_s and now > self._signed_at + self._patience.hang_s:
            return f"gave no sign of life for {self._patience.hang_s:g} s"
        return None
