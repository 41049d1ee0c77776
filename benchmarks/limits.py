"""What the machine could do at best, measured by the ranks that are compared.

On one host it is memory. An operation has to read and write certain bytes, whatever it computes, so its limit is to
copy just these, over the same memory, all ranks at once, with no waiting for each other. A question states them as a
list of copies between the ranks' arrays. A copy is a yardstick, not a law: who reads several arrays side by side has
more lines on their way from memory at once, so that some rows come out well above 100 %.

Between hosts it is the link: how fast a rank of each host can stream to a rank of the next, all hosts at once; measured
once, before all else. A question states how many bytes have to leave a host.

Neither knows of latency: for small sizes both are far off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mpipar.comm import Communicator
from mpipar.comm.mpi import MPI

Bytes = npt.NDArray[np.uint8]

_BLOCK_BYTES = 256 << 10  # what was read for one copy is still in the core's cache for the next
_STREAMED_BYTES = 4 << 20  # a message, long past the size at which a link is as fast as it gets
_IN_FLIGHT = 4


class Place(NamedTuple):
    """Where bytes lie: in an array of a rank, from `start` bytes on."""

    rank: int
    start: int
    array: int = 0


class Copy(NamedTuple):
    """Bytes that one rank copies."""

    source: Place
    target: Place
    num_bytes: int


def copying(memory: Sequence[Sequence[Bytes]], copies: Sequence[Copy]) -> Callable[[], None]:
    """What makes all the copies, block by block: the first block of each, then the second of each.

    Args:
        memory: [arrays][ranks], bytes that all ranks of the host see.
        copies: Of this rank.
    """
    longest = max((copy.num_bytes for copy in copies), default=0)
    blocks = [
        (_block(memory, copy.target, start, copy.num_bytes), _block(memory, copy.source, start, copy.num_bytes))
        for start in range(0, longest, _BLOCK_BYTES)
        for copy in copies
        if start < copy.num_bytes
    ]

    def run() -> None:
        for target, source in blocks:
            np.copyto(target, source)

    return run


def together(world: Communicator, copy: Callable[[], None]) -> Callable[[], None]:
    """The copies of all ranks, until the last one is done.

    Where ranks share a core one begins when another has ended. By its own clock each is as fast as if it were alone.
    """

    def run() -> None:
        copy()
        world.barrier()

    return run


def _block(memory: Sequence[Sequence[Bytes]], place: Place, start: int, num_bytes: int) -> Bytes:
    stop = min(start + _BLOCK_BYTES, num_bytes)
    return memory[place.array][place.rank][place.start + start : place.start + stop]


def link_speed(world: Communicator, rounds: int = 5) -> float:
    """Collective: bytes a second from each host to the next while all stream, of the slowest, in the best of rounds."""
    streaming = [ranks[0] for ranks in world.topology.hosts]
    times = np.zeros(rounds)
    sent, received = np.ones(_STREAMED_BYTES, np.uint8), np.ones((_IN_FLIGHT, _STREAMED_BYTES), np.uint8)
    for i in range(-1, rounds):
        world.barrier()
        start = time.perf_counter()
        if world.rank in streaming:
            here = streaming.index(world.rank)
            left, right = streaming[here - 1], streaming[(here + 1) % len(streaming)]
            requests = [MPI.COMM_WORLD.Irecv([row, MPI.BYTE], left) for row in received]
            requests += [MPI.COMM_WORLD.Isend([sent, MPI.BYTE], right) for _ in range(_IN_FLIGHT)]
            MPI.Request.Waitall(requests)
        if i >= 0:
            times[i] = time.perf_counter() - start
    world.all_reduce(times, "max")
    return _IN_FLIGHT * _STREAMED_BYTES / float(times.min())
