"""The ring, segmented and written out by hand: all-reduce, reduce-scatter, all-gather, broadcast.

The array is cut into n chunks, one a rank, and chunks travel round the ring, each rank sending to its right neighbour
only. What arrives is added to (or replaces) what is here, and is passed on. After n - 1 rounds of adding, rank r holds
the sum of chunk r; after n - 1 more rounds of replacing, every rank holds every sum:

    n = 4, chunk numbers as rank 0 sees them           rank 0 sends    receives
    round 0   adding                                        3              2
    round 1                                                 2              1
    round 2                                                 1              0   <- complete: this rank's own
    round 3   replacing                                     0              3
    round 4                                                 3              2
    round 5                                                 2              1

In every round a rank sends what it received in the round before, so all four collectives are one loop,
`circulate`, over different lists of rounds. Chunks travel in segments: while one is added, the next is on the wire,
and the one before is already on its way to the next rank. Each rank sends 2(n-1)/n of the array in an all-reduce, which
is the least possible.

    n ranks    r this rank    a, b first and last element of a segment

Where ranks are on several hosts, the ring goes through all ranks of a host before it leaves for the next: a host's
wire carries the messages of one of its ranks.

Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.p2p import Wire, chunk_bounds, segments
from mpipar.comm.pending import Algorithm, Message

SEGMENT_BYTES = 2 << 20
_RECEIVES_AHEAD = 4


class Arrival(NamedTuple):
    """A segment that is to arrive from the left, and what becomes of it."""

    a: int
    b: int
    adds: bool  # to what is here; else it replaces it
    passed_on: bool
    completes: bool  # the sum of this segment


def all_reduce(wire: Wire, x: Buffer, op: Op, segment_bytes: int = SEGMENT_BYTES) -> Algorithm:
    """Every rank's x becomes the sum (mean, maximum) over all ranks. Bytes sent by a rank: 2(n-1)/n of x."""
    first, arrivals = _all_reduce_route(x.size, x.itemsize, segment_bytes, wire.size, wire.rank)
    yield from circulate(wire, x, op, first, arrivals, wire.size)
    x.commit()


@lru_cache(maxsize=32)  # buckets are reduced in every step, and to work this out again is seen in a sum of a few MiB
def _all_reduce_route(
    size: int, itemsize: int, segment_bytes: int, n: int, r: int
) -> tuple[tuple[tuple[int, int], ...], tuple[Arrival, ...]]:
    """What rank r of n begins with, and what arrives there."""
    chunk = Chunks(chunk_bounds(size, n), itemsize, segment_bytes)
    return tuple(chunk[r - 1]), tuple(adding_and_replacing(n, r, chunk))


def adding_and_replacing(n: int, r: int, chunk: Chunks) -> list[Arrival]:
    """What arrives in an all-reduce at rank r of n."""
    return [
        Arrival(a, b, adds=t < n - 1, passed_on=t < 2 * n - 3, completes=t == n - 2)
        for t in range(2 * n - 2)
        for a, b in chunk[r - 2 - t]
    ]


def reduce_scatter(
    wire: Wire, x: Buffer, op: Op, bounds: Sequence[int], segment_bytes: int = SEGMENT_BYTES
) -> Algorithm:
    """A rank's shard of x becomes its sum over all ranks, the rest of x is garbage. Bytes sent by a rank: (n-1)/n of x.

    Args:
        wire: Through all ranks.
        x: The same size on all ranks.
        op: The operation.
        bounds: [n + 1], the shard of rank i of the communicator is x[bounds[i]:bounds[i + 1]].
        segment_bytes: Of a message.
    """
    n, r = wire.size, wire.rank
    chunk = Chunks(bounds, x.itemsize, segment_bytes, wire.members)
    arrivals = [
        Arrival(a, b, adds=True, passed_on=t < n - 2, completes=t == n - 2)
        for t in range(n - 1)
        for a, b in chunk[r - 2 - t]
    ]
    yield from circulate(wire, x, op, chunk[r - 1], arrivals, n)
    x.commit()


def all_gather(wire: Wire, x: Buffer, bounds: Sequence[int], segment_bytes: int = SEGMENT_BYTES) -> Algorithm:
    """Every rank gives its shard of x and receives the others. Bytes sent by a rank: (n-1)/n of x.

    Args:
        wire: Through all ranks.
        x: The same size on all ranks.
        bounds: As for `reduce_scatter`.
        segment_bytes: Of a message.
    """
    n, r = wire.size, wire.rank
    chunk = Chunks(bounds, x.itemsize, segment_bytes, wire.members)
    arrivals = [
        Arrival(a, b, adds=False, passed_on=t < n - 2, completes=False)
        for t in range(n - 1)
        for a, b in chunk[r - 1 - t]
    ]
    yield from circulate(wire, x, "sum", chunk[r], arrivals, n)
    x.commit()


def broadcast(wire: Wire, x: Buffer, root: int, segment_bytes: int = SEGMENT_BYTES) -> Algorithm:
    """Every rank's x becomes that of `root`: a chain of segments. Bytes sent by a rank: x, by the last rank none.

    Args:
        wire: Through all ranks.
        x: The same size on all ranks.
        root: Its rank in the communicator.
        segment_bytes: Of a message.
    """
    n, r, first = wire.size, wire.rank, wire.members.index(root)
    whole = Chunks([0, x.size], x.itemsize, segment_bytes)[0]
    if r == first:
        yield from circulate(wire, x, "sum", whole, (), n)
    else:
        last = (r + 1) % n == first
        arrivals = [Arrival(a, b, adds=False, passed_on=not last, completes=False) for a, b in whole]
        yield from circulate(wire, x, "sum", (), arrivals, n)
    x.commit()


class Chunks:
    """chunk[i]: the segments of the chunk of rank i of the wire, modulo n.

    Args:
        bounds: [n + 1] where chunks begin and end.
        itemsize: Bytes of an element.
        segment_bytes: The largest message.
        owners: Which chunk is that of rank i of the wire; by default chunk i.
    """

    def __init__(self, bounds: Sequence[int], itemsize: int, segment_bytes: int, owners: Sequence[int] | None = None):
        self._bounds = bounds
        self._owners = range(len(bounds) - 1) if owners is None else owners
        self._elements = max(1, segment_bytes // itemsize)

    def __getitem__(self, i: int) -> list[tuple[int, int]]:
        owner = self._owners[i % len(self._owners)]
        return list(segments(self._bounds[owner], self._bounds[owner + 1], self._elements))


def circulate(
    wire: Wire, x: Buffer, op: Op, first: Sequence[tuple[int, int]], arrivals: Sequence[Arrival], count: int
) -> Algorithm:
    """Sends the segments `first`, then takes each arrival, in order, adds or stores it, and passes it on.

    Args:
        wire: The ring.
        x: What goes round.
        op: What adding is.
        first: What this rank begins with.
        arrivals: What comes from the left.
        count: What a mean divides by.
    """
    if wire.size == 1:
        return
    yield from x.expect(chain(first, ((arrival.a, arrival.b) for arrival in arrivals if arrival.adds)))
    left, right = (wire.rank - 1) % wire.size, (wire.rank + 1) % wire.size
    sent: dict[int, Message] = {}
    for a, b in first:
        yield from x.coming(a, b)
        sent[a] = wire.send(x, a, b, right)
    posted: list[Message] = []
    added = [arrival.b - arrival.a for arrival in arrivals if arrival.adds]
    scratch = wire.scratch.take(x, max(added), min(_RECEIVES_AHEAD, len(added))) if added else []

    def post(index: int) -> Algorithm:
        a, b, adds, *_ = arrivals[index]
        into, start, stop = (scratch[index % _RECEIVES_AHEAD], 0, b - a) if adds else (x, a, b)
        yield from into.coming(start, stop)
        posted.append(wire.receive(into, start, stop, left))

    for i, (a, b, adds, passed_on, completes) in enumerate(arrivals):
        horizon = min(i + _RECEIVES_AHEAD, len(arrivals))
        while len(posted) < horizon and _lands_in_free_memory(arrivals, i, len(posted), sent):
            yield from post(len(posted))
        if len(posted) == i:
            # This cannot deadlock. A segment is sent n - 1 rounds before another value of it arrives, so a rank that is
            # no further behind than its sender has taken it already; and of all ranks the one furthest behind has
            # such a neighbour.
            yield sent.pop(a)
            yield from post(i)
        yield posted[i]
        if adds:
            yield from x.coming(a, b)
            x.combine(a, b, op, scratch[i % _RECEIVES_AHEAD])
        if completes and op == "mean":
            x.scale(a, b, 1 / count)
        if passed_on:
            yield from x.coming(a, b)
            sent[a] = wire.send(x, a, b, right)
        if completes or not adds:
            x.settle(a, b)
    yield from sent.values()


def _lands_in_free_memory(arrivals: Sequence[Arrival], now: int, index: int, sent: dict[int, Message]) -> bool:
    """Whether arrival `index` may be posted: no earlier value of its segment is awaited or being sent."""
    a, _, adds, *_ = arrivals[index]
    if adds:
        return True
    if any(earlier.a == a for earlier in arrivals[now:index]):
        return False
    return a not in sent or sent[a].through()
