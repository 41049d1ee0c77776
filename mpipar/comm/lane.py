"""Operations that have been started, and the lane of a communicator in which they are until they are done."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from mpipar.comm.mpi import MPI
from mpipar.comm.pending import Algorithm, Message, Pending
from mpipar.comm.roll_call import RollCall, explained
from mpipar.errors import DeadRankError, MessageError

Channel = tuple[str, int] | None
"""What a send or receive is, with its peer, and its tag; None for what is neither."""


class Driver(Protocol):
    """What drives operations: `progress.Progress`."""

    def poll(self) -> bool:
        """Advances every operation that can advance without waiting; whether any did."""

    def finish(self, work: Work) -> None:
        """Waits for one operation, and moves the others meanwhile."""


class Lane:
    """The operations of one communicator that have been started and are not done.

    Args:
        axis: Its name, for messages.
        comm: Its ranks.
    """

    def __init__(self, axis: str, comm: MPI.Comm):
        self.axis = axis
        self.roll_call = RollCall(comm)
        self.queue: deque[Work] = deque()  # of collectives: the head runs
        self.loose: list[Work] = []  # sends and receives: all run
        self.broken: Exception | None = None  # why there can be no more collectives: ranks are out of step

    @property
    def busy(self) -> bool:
        return bool(self.queue or self.loose)

    def refusal(self) -> Exception:
        """What collectives end with that have not begun when the ranks are out of step."""
        if isinstance(self.broken, DeadRankError):
            return self.broken
        return MessageError(f"axis {self.axis!r} cannot be used any more, its ranks are out of step: {self.broken}")

    @property
    def needs_asking(self) -> bool:
        """Whether anything here comes about only if this process asks for it."""
        running = [*list(self.queue)[:1], *self.loose]
        return any(work.needs_asking for work in running)

    def advance_loose(self) -> tuple[bool, list[Work]]:
        """Advances sends and receives: whether any moved, and those that are done now.

        MPI matches the messages of a channel in the order in which they are posted. So one that still waits for its
        array to come from a GPU holds up those that were started after it.
        """
        moved = False
        held: set[Channel] = set()
        for work in self.loose:
            if work.channel in held:
                continue
            moved |= work.advance()
            if work.holds_channel:
                held.add(work.channel)
        done = [work for work in self.loose if work.done]
        self.loose = [work for work in self.loose if not work.done]
        return moved, done

    def head_of(self, work: Work) -> Work:
        """What a work waits for on this rank: the one before it whose turn it is, or itself."""
        if work in self.queue:
            return self.queue[0]
        return next((other for other in self.loose if other.holds_channel and other.channel == work.channel), work)

    def status(self) -> str:
        """What this rank is doing here, for the other ranks."""
        return str(self.queue[0] if self.queue else self.loose[0] if self.loose else "")


class Work:
    """An operation that has been started. It keeps every buffer it uses alive until it is done.

    Args:
        progress: What drives it.
        lane: Where it queues.
        what: What was called, for messages.
        sequence: Its number among the collectives of its communicator; None for sends and receives.
        algorithm: What it does.
        channel: Of a send or receive: with which others it must keep the order of their starts.
    """

    __slots__ = ("_algorithm", "_pending", "_progress", "_sequence", "_what", "channel", "done", "error", "lane")

    def __init__(
        self,
        progress: Driver,
        lane: Lane,
        what: object,
        sequence: int | None,
        algorithm: Algorithm,
        channel: Channel = None,
    ):
        self.lane = lane
        self.channel = channel
        self.done = False
        self.error: Exception | None = None
        self._what = what
        self._sequence = sequence
        self._progress = progress
        self._algorithm = algorithm
        self._pending: Pending | None = None

    def __str__(self) -> str:
        return str(self._what) if self._sequence is None else f"{self._what} #{self._sequence}"

    def wait(self) -> None:
        """Returns when the operation is done.

        Raises:
            StallError: Nothing moved for longer than the time-out.
            MessageError: The ranks disagree on the operation, or on the size of the array.
            DeadRankError: A rank died, in a job that was started to survive it.
        """
        self._progress.finish(self)

    def test(self) -> bool:
        """Advances whatever can advance; whether this operation is done, or has failed, which `wait` then raises."""
        self._progress.poll()
        return self.done

    @property
    def is_collective(self) -> bool:
        """Whether all ranks take part in it."""
        return self._sequence is not None

    @property
    def only_peer(self) -> int | None:
        """The rank that a send or receive waits for; None for a collective, which may wait for any."""
        return self._pending.peer if self._sequence is None and isinstance(self._pending, Message) else None

    @property
    def holds_channel(self) -> bool:
        """Whether no message has been posted yet, so that those of the same channel have to wait."""
        return self.channel is not None and not self.done and not isinstance(self._pending, Message)

    @property
    def needs_asking(self) -> bool:
        """Whether it goes on only if this process asks for it."""
        return self._pending is not None and self._pending.moved_by_asking

    def stuck(self) -> str | None:
        """Why it does not go on, if that is not for other ranks to say."""
        return self._pending.stuck() if self._pending is not None else None

    def advance(self) -> bool:
        """Runs the algorithm up to what has not happened yet; whether anything moved."""
        if self.done:  # ended by an interrupt, and not retired since
            return True
        try:
            if self._pending is not None and not self._pending.through():
                return False
            for pending in self._algorithm:
                if not pending.through():
                    self._pending = pending
                    return True
        except MessageError as error:
            self.error = MessageError(f"{self} on axis {self.lane.axis!r}: {error.message}")
            self.error.__cause__ = error  # whose traceback keeps alive what messages may still be written into
        except MPI.Exception as error:
            self.error = self.explained(error)
        except Exception as error:
            self.error = error
        except BaseException:  # an interrupt: who catches it must not take this for done
            self.error = MessageError(f"{self} on axis {self.lane.axis!r} was interrupted")
            self._pending, self.done = None, True
            if self.is_collective:
                self.lane.broken = self.error
            raise
        self._pending = None
        self.done = True
        return True

    def fail(self, error: Exception) -> None:
        """Ends it, begun or not."""
        self.error = error
        self._pending, self.done = None, True

    def explained(self, error: MPI.Exception) -> Exception:
        """The error of this operation if that is MPI's: it names who has died."""
        return explained(self.lane.roll_call.comm, f"{self} on axis {self.lane.axis!r}", error)
