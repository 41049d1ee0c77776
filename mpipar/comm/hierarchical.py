"""All-reduce in two storeys: in shared memory on each host, round rings between hosts.

As many rings go through the hosts as the host with the fewest ranks has: ring j is of the j-th rank of each host, and
takes slice j of the array. What a rank brings to its ring is the sum over its host's segments; what it has from the
ring in the end it writes into all of them:

    host A    segment 0  [ slice 0 | slice 1 ]           rank 0 of A  <---- ring 0: slice 0 ---->  rank 0 of B
              segment 1  [ slice 0 | slice 1 ]           rank 1 of A  <---- ring 1: slice 1 ---->  rank 1 of B

A host sends 2(h-1)/h of the array, once, not once a rank. The sum over a host is made segment by segment, when the ring
comes to it, while the segments before are on the wire; so is the writing back. Ranks that a host has more than there
are rings only wait.

h hosts    j this rank's ring
"""

from __future__ import annotations

from collections.abc import Sequence

from mpipar.comm.buffers import Buffer, Op, accumulate
from mpipar.comm.call import Call
from mpipar.comm.host import Host
from mpipar.comm.p2p import Wire, chunk_bounds
from mpipar.comm.pending import Algorithm
from mpipar.comm.ring import Chunks, adding_and_replacing, circulate
from mpipar.comm.sums import plan_sum, run
from mpipar.comm.topology import Topology

_SEGMENT_BYTES = 1 << 20  # on a wire, smaller ones than in memory: the next rank can begin earlier


def all_reduce(
    wire: Wire,
    topology: Topology,
    host: Host | None,
    column: Sequence[Buffer],
    op: Op,
    call: Call,
    segment_bytes: int = _SEGMENT_BYTES,
) -> Algorithm:
    """Every segment's x, on every host, becomes the sum (mean, maximum) over all. Bytes sent by a host: 2(h-1)/h of x.

    Args:
        wire: Through all ranks.
        topology: Which of them share a host.
        host: This host's ranks; None if this is the only one.
        column: x in the segments of this host's ranks.
        op: The operation.
        call: What was called.
        segment_bytes: Of a message.
    """
    j = 0 if host is None else host.rank
    if host is not None:
        yield from host.meet(call)
    if j < topology.num_rings:
        ring = wire.among(topology.ring(j))
        slices = chunk_bounds(column[0].size, topology.num_rings)
        bounds = [slices[j] + bound for bound in chunk_bounds(slices[j + 1] - slices[j], ring.size)]
        x = Column(column, j, op)
        chunk = Chunks(bounds, x.itemsize, segment_bytes)
        first = chunk[ring.rank - 1]
        for a, b in first:
            x.add_up(a, b)
        yield from circulate(ring, x, op, first, adding_and_replacing(ring.size, ring.rank, chunk), wire.size)
    if host is not None:
        yield from host.meet()


class Column(Buffer):
    """One array on all ranks of a host, to a ring like the buffer of one rank."""

    __slots__ = ("_buffers", "_op", "_own")

    def __init__(self, buffers: Sequence[Buffer], own: int, op: Op):
        super().__init__(buffers[own].values)
        self._buffers = buffers
        self._own = own
        self._op: Op = op

    def add_up(self, start: int, stop: int) -> None:
        """The own elements [start, stop) become their sum over the host. A mean divides at the end of the ring."""
        if len(self._buffers) == 1:
            return
        op: Op = "max" if self._op == "max" else "sum"
        mine = self._buffers[self._own]
        sources = [mine, *(buffer for buffer in self._buffers if buffer is not mine)]
        run(plan_sum((mine, start), [(buffer, start) for buffer in sources], stop - start, op, count=1))

    def combine(self, start: int, stop: int, op: Op, other: Buffer) -> None:
        """Adds what has come from another host to the sum over this one."""
        self.add_up(start, stop)
        accumulate(self.lib, op, self.values[start:stop], other.values[: stop - start])

    def settle(self, start: int, stop: int) -> None:
        """Gives the final value to the host's other ranks."""
        for buffer in self._buffers:
            if buffer is not self._buffers[self._own]:
                buffer.values[start:stop] = self.values[start:stop]
