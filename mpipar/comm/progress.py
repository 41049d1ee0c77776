"""Moving communication forward: started operations, and the one loop that waits for them.

`Progress` drives the generators that have been started (see `pending`). Those of one communicator, its `lane`, run one
after the other in the order of their start, which is the same on all ranks, so ranks never negotiate what comes next.
`poll` advances whatever can advance without waiting (called from backward hooks: communication overlaps with
computation without a thread); `finish` polls until one operation is done or nothing has moved for `timeout_s`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from typing import NoReturn

from mpipar.comm.device.gpu import Gpu
from mpipar.comm.environment import can_survive
from mpipar.comm.lane import Lane, Work
from mpipar.comm.mpi import MPI
from mpipar.comm.roll_call import explained
from mpipar.comm.watchdog import Pulse
from mpipar.errors import StallError


class Progress:
    """The started operations of a process.

    Args:
        timeout_s: How long nothing may move while it is waited for, in seconds.

    Attributes:
        pulse: This rank's signs of life. Waiting is one: it is another who hangs.
        gpus: Those on which this process works in memory of other ranks, and the stream on which it does.
    """

    def __init__(self, timeout_s: float = 600.0):
        self.timeout_s = timeout_s
        self.pulse = Pulse()
        self.gpus: dict[Gpu, int] = {}
        self._survives = can_survive()
        self._lanes: list[Lane] = []
        self._busy: list[Lane] = []
        self._failed: list[Work] = []

    def open_lane(self, axis: str, comm: MPI.Comm) -> Lane:
        """The lane of a new communicator."""
        self._lanes.append(Lane(axis, comm))
        return self._lanes[-1]

    def close_lane(self, lane: Lane) -> None:
        """Forgets the lane of a communicator that is freed."""
        assert not lane.busy, "a communicator was freed with operations under way"
        self._lanes.remove(lane)

    def abandon(self) -> None:
        """After a death: ends all operations, of all communicators, on all ranks, and forgets the communicators."""
        for lane in self._lanes:
            lane.roll_call.comm.Revoke()
        # MPI may still hold the memory of what was under way.
        self._failed += [work for lane in self._busy for work in (*lane.queue, *lane.loose)]
        self._lanes.clear()
        self._busy.clear()

    def start(self, work: Work) -> Work:
        """Queues a collective behind those that its communicator has started before."""
        lane = work.lane
        if lane.broken is not None:
            raise lane.refusal()
        if not lane.queue:
            self._begin(work)
        if not work.done:
            lane.queue.append(work)
            self._occupy(lane)
        return work

    def start_now(self, work: Work) -> Work:
        """Starts a send or receive at once: it must not queue behind a receive that it may be the answer to."""
        if work.lane.head_of(work) is work:
            self._begin(work)
        if not work.done:
            work.lane.loose.append(work)
            self._occupy(work.lane)
        return work

    def poll(self) -> bool:
        """Advances every operation that can advance without waiting; whether any did."""
        moved = False
        for lane in self._busy:
            queue = lane.queue
            while queue and queue[0].advance():
                moved = True
                if not queue[0].done:
                    break
                self._retire(queue.popleft())
            if lane.loose:
                any_moved, done = lane.advance_loose()
                moved |= any_moved
                for work in done:
                    self._retire(work)
        if moved:
            self._busy = [lane for lane in self._busy if lane.busy]
        return moved

    def look_for_deaths(self) -> None:
        """For who computes, and waits for nobody: whether there is any sense in going on.

        Where ranks cannot be survived it does nothing: a death ends the job.

        Raises:
            DeadRankError: A rank has died, or others have noticed that one has.
        """
        if self._survives:
            for lane, error in self._answer_roll_calls():
                raise explained(lane.roll_call.comm, f"axis {lane.axis!r}", error)

    def finish(self, work: Work) -> None:
        """Waits for one operation, and moves the others meanwhile."""
        silent_since = 0.0
        idle_polls = look_at = 0
        while not work.done:
            if self.poll():
                idle_polls = 0
                continue
            if idle_polls == 0:
                silent_since = time.monotonic()
                look_at = _POLLS_PER_LOOK
            idle_polls += 1
            os.sched_yield()
            if idle_polls == look_at:
                waited_s = time.monotonic() - silent_since
                self._hear()
                self.pulse.beat()
                if not any(lane.needs_asking for lane in self._busy):  # devices get there by themselves
                    look_at = idle_polls + 1
                    time.sleep(min(_NAP_S, waited_s * _LATE))
                else:
                    look_at = idle_polls + _POLLS_PER_LOOK
                    if waited_s > _PATIENCE_S:
                        time.sleep(_NAP_S)
                if waited_s > self.timeout_s:
                    self._report_stall(work, waited_s)
        if work.error is not None:
            raise work.error

    def _begin(self, work: Work) -> None:
        """Advances an operation for the first time."""
        try:
            work.advance()
        finally:  # also after an interrupt
            if work.done:
                self._retire(work)

    def _retire(self, work: Work) -> None:
        """Forgets an operation that is done, but for one that failed: MPI may still write into its memory.

        With a collective that failed end those behind it: the others are not where this rank is.
        """
        if work.error is None:
            return
        self._failed.append(work)
        if work.is_collective:
            lane = work.lane
            lane.broken = work.error
            for waiting in lane.queue:
                waiting.fail(lane.refusal())
            lane.queue.clear()

    def _occupy(self, lane: Lane) -> None:
        if lane not in self._busy:
            self._busy.append(lane)

    def _answer_roll_calls(self) -> Iterator[tuple[Lane, MPI.Exception]]:
        """Says what this rank is doing to whoever asks; gives the lanes in which it hears that a rank is dead."""
        for lane in self._lanes:
            try:
                lane.roll_call.answer(partial(self._doing, lane))
            except MPI.Exception as error:
                yield lane, error

    def _hear(self) -> None:
        """For who waits: answers roll calls, and ends what waits for the dead."""
        for lane, error in self._answer_roll_calls():
            self._fail(lane, error)

    def _fail(self, lane: Lane, error: MPI.Exception) -> None:
        """Ends what waits on a lane of which a rank is dead."""
        if not lane.busy:
            return
        for work in (*lane.queue, *lane.loose):
            work.fail(work.explained(error))
            self._retire(work)
        lane.queue.clear()
        lane.loose.clear()
        self._busy = [lane for lane in self._busy if lane.busy]

    def _doing(self, lane: Lane) -> str:
        """What this rank is doing on a lane, or else on another."""
        elsewhere = (f"{busy.status()} on axis {busy.axis!r}" for busy in self._busy)
        return lane.status() or next(elsewhere, "")

    def _report_stall(self, work: Work, waited_s: float) -> NoReturn:
        """Names what is waited for and who is missing. What blocks is the head of the queue, not what waits behind."""
        lane = work.lane
        head = lane.head_of(work)
        why = head.stuck() or lane.roll_call.take(str(head), head.only_peer, self._hear)
        if work.error is not None:  # a death, noticed meanwhile
            raise work.error
        raise StallError(
            f"{head} on axis {lane.axis!r}: nothing moved for {waited_s:.0f} s. {why}. Look at the output of those "
            "ranks; --comm.timeout-s makes the wait longer"
        )


# Idle polls between two looks at the clock.
_POLLS_PER_LOOK = 256
# A peer that is silent for this long computes or reads a file: give it, and the loader's thread, the core.
_PATIENCE_S = 0.02
_NAP_S = 0.0005
# Of a device, which needs nobody to ask: how much later than it is done that may be noticed, as part of the wait.
_LATE = 0.01
