"""Who is there? When nothing moves, the ranks of a communicator tell each other what they are doing.

The rank whose time-out has run out first calls: it sends what it waits for to all others. Whoever else is waiting
answers with what it waits for itself. After a few seconds the caller knows who has arrived, who is in another
operation, and who gives no sign: that one computes, sleeps, or is stopped. It reports, once, for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from mpipar.comm.mpi import MPI
from mpipar.errors import DeadRankError

ROLL_CALL_TAG = 32_767  # the largest that MPI promises

_NOTE_BYTES = 256
_CALL, _ANSWER = "?", "!"  # what a note begins with
_ANSWERS_S = 2.0  # a rank that waits looks for calls every few milliseconds


class RollCall:
    """The notes that the ranks of one communicator send each other.

    Args:
        comm: Whose ranks.
    """

    def __init__(self, comm: MPI.Comm):
        self.comm = comm
        self._heard: dict[int, str] = {}  # by rank
        self._under_way: list[tuple[MPI.Request, object]] = []

    def answer(self, status: Callable[[], str]) -> None:
        """Hears who has called, and tells them what this rank is doing.

        Args:
            status: Says what it is doing. Hardly ever anybody asks.

        Raises:
            MPI.Exception: A rank is dead, in a job that was started to survive it.
        """
        for rank in self._listen():
            self._tell(rank, _ANSWER + status())

    def take(self, status: str, peer: int | None, meanwhile: Callable[[], None]) -> str:
        """Calls, and says who did not answer.

        Of several ranks that call at the same time the lowest reports, and ends the job, while the others still wait.

        Args:
            status: What this rank waits for.
            peer: The only rank that it waits for, if there is one.
            meanwhile: Answers the calls of others, here and on the other communicators.
        """
        others = [rank for rank in range(self.comm.size) if rank != self.comm.rank] if peer is None else [peer]
        self._heard.clear()
        dead = [rank for rank in others if not self._tell(rank, _CALL + status)]
        deadline = time.monotonic() + _ANSWERS_S
        while time.monotonic() < deadline and not self._heard.keys() >= set(others) - set(dead):
            meanwhile()
            time.sleep(0.001)
        if peer is None and any(rank < self.comm.rank for rank in self._heard):
            until = time.monotonic() + _ANSWERS_S
            while time.monotonic() < until:  # it may call only now, and must not take this rank for silent
                meanwhile()
                time.sleep(0.001)
        return _report(status, self.comm.rank, others, self._heard, dead)

    def _listen(self) -> list[int]:
        """Takes the notes that have come; returns who has called."""
        callers = []
        status = MPI.Status()
        while self.comm.Iprobe(MPI.ANY_SOURCE, ROLL_CALL_TAG, status):
            note = np.empty(_NOTE_BYTES, np.uint8)
            source = status.Get_source()
            self.comm.Recv([note, MPI.BYTE], source, ROLL_CALL_TAG)
            text = note.tobytes().rstrip(b"\0").decode(errors="replace")
            self._heard[source] = text[1:]
            if text[:1] == _CALL:
                callers.append(source)
        self._under_way = [(request, note) for request, note in self._under_way if not request.Test()]
        return callers

    def _tell(self, rank: int, text: str) -> bool:
        """Sends a note; False if the rank is known to be dead."""
        note = np.frombuffer(text.encode()[:_NOTE_BYTES].ljust(_NOTE_BYTES, b"\0"), np.uint8)
        try:
            self._under_way.append((self.comm.Isend([note, MPI.BYTE], rank, ROLL_CALL_TAG), note))
        except MPI.Exception:
            return False
        return True


def is_failure(error: MPI.Exception) -> bool:
    """Whether it says that a rank died, or that others have noticed and stopped all communication."""
    kinds = [getattr(MPI, name, None) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")]
    return error.Get_error_class() in kinds


def explained(comm: MPI.Comm, where: str, error: MPI.Exception) -> Exception:
    """The error that names who has died, if that is what MPI's error says; else that error."""
    if not is_failure(error):
        return error
    failed = comm.Get_failed()
    ranks = MPI.Group.Translate_ranks(failed, None, comm.Get_group())
    who = names(ranks) + " died" if ranks else "the communicator was revoked"
    dead = DeadRankError(f"{where}: {who}. The others cannot go on without")
    dead.__cause__ = error
    return dead


def _report(status: str, own: int, others: Sequence[int], heard: dict[int, str], dead: Sequence[int]) -> str:
    """Sentences, without the last full stop."""
    here = sorted([own, *(rank for rank in others if heard.get(rank) == status)])
    silent = [rank for rank in others if rank not in heard and rank not in dead]
    elsewhere = [rank for rank in others if rank in heard and heard[rank] != status]
    parts = []
    if dead:
        parts.append(f"{names(dead)} died")
    if silent:
        parts.append(f"{names(silent)} did not arrive, and gave no sign for {_ANSWERS_S:.0f} s: busy, stuck or gone")
    parts += [f"{names([rank])} is in {heard[rank] or 'no operation'}" for rank in elsewhere]
    if not parts:
        parts.append("all ranks are in it: messages are lost, or the network is down")
    parts.append(f"{names(here)} waited")
    return ". ".join(part[0].upper() + part[1:] for part in parts)


def names(ranks: Sequence[int]) -> str:
    """Ranks as they are named in messages."""
    listed = ", ".join(str(rank) for rank in ranks[:16]) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
