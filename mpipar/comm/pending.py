"""What an algorithm waits for: a message that is under way, a neighbour that is to come.

An algorithm is a generator. It posts messages, or meets its neighbours, and yields each thing it has to wait for; it
reads like blocking code, and who drives it (`progress`) decides whether it blocks:

    for segment in ...:
        yield incoming            # resumes when the message is here
        x.combine(...)

MPI's requests are completed in `Message.through` alone, one at a time, in the order in which the generator yields them:
receives before the sends that they enable. MPI_Waitall is not used: under fault tolerance it frees requests that failed
while their peers still answer, which makes a job impossible to repair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from mpipar.comm.mpi import MPI
from mpipar.errors import MessageError


class Pending(ABC):
    """What an algorithm waits for."""

    __slots__ = ()

    moved_by_asking = True
    """Whether it needs this process to come about. If not, who waits can leave the processor to others."""

    @abstractmethod
    def through(self) -> bool:
        """Whether it has happened."""

    def stuck(self) -> str | None:
        """Why it does not happen, if that is not for other ranks to say. A sentence without a full stop."""
        return None


class Message(Pending):
    """A posted message.

    Args:
        request: MPI's.
        peer: The rank in the communicator that it comes from or goes to; None if MPI talks to all of them.
        receiving: Whether it comes.
        num_bytes: Its size.
    """

    __slots__ = ("_request", "_through", "num_bytes", "peer", "receiving")

    def __init__(self, request: MPI.Request, peer: int | None, *, receiving: bool, num_bytes: int):
        self._request = request
        self._through = False
        self.peer = peer
        self.receiving = receiving
        self.num_bytes = num_bytes

    def through(self) -> bool:
        """Whether the message is through. Testing is also what makes MPI move all the others.

        Raises:
            MessageError: It is shorter or longer than the memory that awaits it.
        """
        if self._through:
            return True
        if not self.receiving:
            self._through = self._request.Test()
            return self._through
        status = MPI.Status()
        try:
            self._through = self._request.Test(status)
        except MPI.Exception as error:
            if error.Get_error_class() == MPI.ERR_TRUNCATE:
                raise self._mismatch(f"more than {self.num_bytes:,}") from error
            raise
        if self._through and self.peer is not None:
            arrived = status.Get_count(MPI.BYTE)
            if arrived != self.num_bytes:
                raise self._mismatch(f"{arrived:,}")
        return self._through

    def _mismatch(self, sent: str) -> MessageError:
        return MessageError(
            f"rank {self.peer} sent {sent} bytes where {self.num_bytes:,} were expected: all ranks must make this "
            "call with the same size and dtype"
        )


Algorithm = Iterator[Pending]
Finish = Callable[[Algorithm], None]
