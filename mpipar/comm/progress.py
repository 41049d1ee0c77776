"""Moving communication forward: started operations, and the one place where MPI's requests are completed.

An algorithm is a generator. It posts messages and yields each one it has to wait for; it reads like blocking code, and
who drives it decides whether it blocks:

    for segment in ...:
        yield incoming            # resumes when the message is here
        x.combine(...)

`Progress` drives the generators that have been started. Those of one communicator run one after the other in the
order of their start, which is the same on all ranks, so ranks never negotiate what comes next. `poll` advances whatever
can advance without waiting (called from backward hooks: communication overlaps with computation without a thread);
`finish` polls until one operation is done or its peer has been silent for `timeout_s`.

Requests are completed in `completed` alone, one at a time, in the order in which the generator yields them: receives
before the sends that they enable. MPI_Waitall is not used: under fault tolerance it frees requests that failed while
their peers still answer, which makes a job impossible to repair.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from mpipar.comm.mpi import MPI
from mpipar.errors import MessageError, StallError


@dataclass(slots=True)
class Pending:
    """A posted message and whom it waits for."""

    request: MPI.Request
    peer: int  # rank in the communicator
    receiving: bool
    num_bytes: int
    through: bool = False


Algorithm = Iterator[Pending]


class Work:
    """An operation that has been started. It keeps every buffer it uses alive until it is done."""

    def __init__(self, progress: Progress, name: str, axis: str, algorithm: Algorithm):
        self.name = name
        self.axis = axis
        self.done = False
        self.error: Exception | None = None
        self._progress = progress
        self._algorithm = algorithm
        self._pending: Pending | None = None

    def wait(self) -> None:
        """Returns when the operation is done.

        Raises:
            StallError: A peer was silent for longer than the time-out.
            MessageError: The ranks disagree on the size of the array.
        """
        self._progress.finish(self)

    def test(self) -> bool:
        """Advances whatever can advance; whether this operation is done, or has failed, which `wait` then raises."""
        self._progress.poll()
        return self.done

    def advance(self) -> bool:
        """Runs the algorithm up to the first message that is not here yet; whether anything moved."""
        moved = False
        try:
            while self._pending is None or completed(self._pending):
                self._pending = next(self._algorithm)
                moved = True
        except StopIteration:
            self.done = moved = True
        except MessageError as error:
            self.done = True
            self.error = MessageError(f"{self.name} on axis {self.axis!r}: {error.message}")
        except Exception as error:
            self.done = True
            self.error = error
        return moved or self.done

    def stalled(self, waited_s: float) -> StallError:
        assert self._pending is not None
        peer = self._pending.peer
        doing = f"nothing came from rank {peer}" if self._pending.receiving else f"rank {peer} took nothing"
        return StallError(
            f"{self.name} on axis {self.axis!r}: {doing} for {waited_s:.0f} s. That rank, or one it waits for, is "
            "stuck, gone, or in another operation. Look at that rank's output; --comm.timeout-s makes the wait longer"
        )


class Progress:
    """The started operations of a process, in lanes: one lane a communicator, first in first out.

    Args:
        timeout_s: How long a peer may be silent while it is waited for, in seconds.
    """

    def __init__(self, timeout_s: float = 600.0):
        self.timeout_s = timeout_s
        self._lanes: dict[int, deque[Work]] = {}
        self._loose: list[Work] = []
        self._failed: list[Work] = []

    def start(self, work: Work, lane: int) -> Work:
        """Queues a collective behind those that its communicator has started before."""
        self._lanes.setdefault(lane, deque()).append(work)
        self.poll()
        return work

    def start_now(self, work: Work) -> Work:
        """Starts a send or receive at once: it must not queue behind a receive that it may be the answer to."""
        self._loose.append(work)
        self.poll()
        return work

    def poll(self) -> bool:
        """Advances every operation that can advance without waiting; whether any did."""
        moved = False
        for lane in self._lanes.values():
            while lane and lane[0].advance():
                moved = True
                if not lane[0].done:
                    break
                self._retire(lane.popleft())
        if self._loose:
            for work in self._loose:
                moved |= work.advance()
                if work.done:
                    self._retire(work)
            self._loose = [work for work in self._loose if not work.done]
        return moved

    def finish(self, work: Work) -> None:
        """Waits for one operation, and moves the others meanwhile."""
        silent_since = time.monotonic()
        idle_polls = 0
        while not work.done:
            if self.poll():
                idle_polls = 0
                continue
            if idle_polls == 0:
                silent_since = time.monotonic()
            idle_polls += 1
            os.sched_yield()
            if idle_polls % 256 == 0:
                waited_s = time.monotonic() - silent_since
                if waited_s > self.timeout_s:
                    raise self._holding_up(work).stalled(waited_s)
                if waited_s > _PATIENCE_S:
                    time.sleep(_NAP_S)
        if work.error is not None:
            raise work.error

    def _retire(self, work: Work) -> None:
        """Forgets an operation that is done; of one that failed MPI may still write into the memory."""
        if work.error is not None:
            self._failed.append(work)

    def _holding_up(self, work: Work) -> Work:
        """The operation that has to move first: the one at the head of the lane in which this one queues."""
        return next((lane[0] for lane in self._lanes.values() if work in lane), work)

    def release(self, lane: int) -> None:
        """Forgets the lane of a communicator that is freed."""
        assert not self._lanes.get(lane), "a communicator was freed with operations under way"
        self._lanes.pop(lane, None)


# A peer that is silent for this long computes or reads a file: give it, and the loader's thread, the core.
_PATIENCE_S = 0.02
_NAP_S = 0.0005


def completed(pending: Pending) -> bool:
    """Whether the message is through. Testing is also what makes MPI move all the others.

    Raises:
        MessageError: It is shorter or longer than the memory that awaits it.
    """
    if pending.through:
        return True
    status = MPI.Status()
    try:
        pending.through = pending.request.Test(status)
    except MPI.Exception as error:
        if error.Get_error_class() == MPI.ERR_TRUNCATE:
            raise _mismatch(pending, f"more than {pending.num_bytes:,}") from error
        raise
    if pending.through and pending.receiving and status.Get_count(MPI.BYTE) != pending.num_bytes:
        raise _mismatch(pending, f"{status.Get_count(MPI.BYTE):,}")
    return pending.through


def _mismatch(pending: Pending, sent: str) -> MessageError:
    return MessageError(
        f"rank {pending.peer} sent {sent} bytes where {pending.num_bytes:,} were expected: all ranks must make this "
        "call with the same size and dtype"
    )
