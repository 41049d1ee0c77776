"""Messages between two ranks: posting them, their tags, their size.

A `Wire` posts the messages of one operation. Everything else in this package that sends does it through a wire, so
this file is where tags are made, where large arrays are cut, and where bytes are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpipar.comm.buffers import Buffer, Scratch
from mpipar.comm.mpi import MPI
from mpipar.comm.pending import Algorithm, Message
from mpipar.comm.roll_call import ROLL_CALL_TAG
from mpipar.errors import MessageError

# Tags. MPI promises 32,767; the smallest seen in use is 2^23 - 1. Messages of a user have the lower half. Collectives
# take one tag each from the upper half, in turn, so that ranks that disagree on the sequence stall, and are named,
# rather than add up bytes of different arrays. The last are for meetings on a host, and for roll calls.
USER_TAGS = 16_384
MEETING_TAG = ROLL_CALL_TAG - 1
_COLLECTIVE_TAGS = MEETING_TAG - USER_TAGS

# MPI counts bytes in 32 bits, and a message this large has long reached the wire's full speed.
LARGEST_MESSAGE_BYTES = 1 << 30


@dataclass(slots=True)
class Account:
    """What the operations of one communicator have in common on a rank."""

    bytes_sent: int = 0
    scratch: Scratch = field(default_factory=Scratch)


class Wire:
    """Posts the messages of one operation on one communicator, or on some of its ranks, in an order of their own.

    Args:
        comm: The communicator.
        tag: Of all messages.
        account: Where they are counted.
        members: Ranks of the communicator. On this wire, rank i is `members[i]`. By default all, in their order.

    Attributes:
        rank: This process on this wire.
        size: How many are on it.
        members: Their ranks in the communicator.
    """

    __slots__ = ("_account", "_tag", "comm", "members", "rank", "size")

    def __init__(self, comm: MPI.Comm, tag: int, account: Account, members: Sequence[int] | None = None):
        self.comm = comm
        self._tag = tag
        self._account = account
        self.members: Sequence[int] = range(comm.size) if members is None else members
        self.rank: int = comm.rank if members is None else members.index(comm.rank)
        self.size: int = len(self.members)

    @classmethod
    def for_collective(cls, comm: MPI.Comm, sequence: int, account: Account) -> Wire:
        """The wire of the communicator's `sequence`-th collective."""
        return cls(comm, USER_TAGS + sequence % _COLLECTIVE_TAGS, account)

    def among(self, members: Sequence[int]) -> Wire:
        """The wire of some ranks of the communicator, this one among them."""
        return Wire(self.comm, self._tag, self._account, members)

    @property
    def scratch(self) -> Scratch:
        """Memory for what is received before it is added."""
        return self._account.scratch

    def send(self, buffer: Buffer, start: int, stop: int, to: int, *, counted: bool = True) -> Message:
        """Posts the sending of elements [start, stop)."""
        num_bytes = (stop - start) * buffer.itemsize
        if counted:
            self._account.bytes_sent += num_bytes
        peer = self.members[to]
        request = self.comm.Isend(buffer.message(start, stop), peer, self._tag)
        return Message(request, peer, receiving=False, num_bytes=num_bytes)

    def receive(self, buffer: Buffer, start: int, stop: int, source: int) -> Message:
        """Posts the receiving of elements [start, stop)."""
        peer = self.members[source]
        request = self.comm.Irecv(buffer.message(start, stop), peer, self._tag)
        return Message(request, peer, receiving=True, num_bytes=(stop - start) * buffer.itemsize)


def chunk_bounds(size: int, n: int) -> list[int]:
    """Where the n chunks of an array of `size` elements begin and end, [n + 1]; their sizes differ by one at most."""
    return [size * i // n for i in range(n + 1)]


def segments(start: int, stop: int, elements: int) -> Iterator[tuple[int, int]]:
    """Cuts [start, stop) into runs of at most `elements`; an empty range has none."""
    for left in range(start, stop, elements):
        yield left, min(left + elements, stop)


def send(wire: Wire, x: Buffer, to: int) -> Algorithm:
    """Sends the whole of x to one rank."""
    yield from x.coming(0, x.size)
    yield from [wire.send(x, a, b, to) for a, b in _pieces(x)]


def receive(wire: Wire, x: Buffer, source: int) -> Algorithm:
    """Receives the whole of x, sent by one rank with the same size and dtype."""
    yield from x.coming(0, x.size)
    yield from [wire.receive(x, a, b, source) for a, b in _pieces(x)]
    x.commit()


def barrier(wire: Wire) -> Algorithm:
    """Nobody leaves before all have entered: ceil(log2 n) rounds of empty messages.

    Dissemination barrier: Hensgen, Finkel & Manber, "Two algorithms for barrier synchronization", 1988.
    """
    nothing = Buffer(np.empty(0, np.uint8))
    distance = 1
    while distance < wire.size:
        incoming = wire.receive(nothing, 0, 0, (wire.rank - distance) % wire.size)
        outgoing = wire.send(nothing, 0, 0, (wire.rank + distance) % wire.size)
        yield incoming
        yield outgoing
        distance *= 2


def check_tag(tag: int) -> int:
    """The tag, if a user may have it."""
    if not 0 <= tag < USER_TAGS:
        raise MessageError(f"tag {tag} is outside [0, {USER_TAGS})")
    return tag


def check_peer(peer: int, size: int) -> int:
    """The rank, if the communicator has it."""
    if not 0 <= peer < size:
        raise MessageError(f"rank {peer} is not in this communicator: its ranks are 0 to {size - 1}")
    return peer


def _pieces(x: Buffer) -> Iterator[tuple[int, int]]:
    """The messages of a whole array. An empty array is one empty message, so that a receiver has one to wait for."""
    if x.size == 0:
        yield 0, 0
    yield from segments(0, x.size, LARGEST_MESSAGE_BYTES // x.itemsize)
