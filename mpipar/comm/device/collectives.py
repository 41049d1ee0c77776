"""Collectives in the memory of the GPUs of one host: as `shared` has them, on streams.

In the arena. x lies at one offset in each rank's segment. Between two meetings rank r adds up chunk r over all
segments, in the order of ranks, and writes the sum into all of them: one kernel, which reads and writes each element n
times over all ranks, the bytes that a copy of the same memory takes.

Through slots. An array elsewhere on the GPU, or a small one, is copied into the rank's slot, a block at a time; after
one meeting every rank adds up all slots into its own x. That is n times the reading, and one meeting, one wait and one
kernel's start less.

All ranks get the same bits: rank r's sum is everybody's, or all add in the same order. The host gives the work to the
device and goes on; `arena` says who waits for whom.

n ranks    r this rank    a, b first and last element
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpipar.comm.buffers import Op
from mpipar.comm.call import Call
from mpipar.comm.device import arena as arena_module
from mpipar.comm.device.arena import DeviceArena, Place
from mpipar.comm.device.gpu import Caller
from mpipar.comm.device.runtime import Addition
from mpipar.comm.host import Host
from mpipar.comm.p2p import chunk_bounds, segments
from mpipar.comm.pending import Algorithm

THROUGH_SLOTS_BYTES = 256 << 10
"""Up to here an array in the arena passes through the slots. Not measured: about what a GPU copies while a kernel
starts."""

_CHUNK_ELEMENTS = 128  # chunks begin at multiples: whole vectors, and whole lines of the GPU's cache


def all_reduce(host: Host, arena: DeviceArena, x: Place, op: Op, call: Call, caller: Caller) -> Algorithm:
    """Every segment's x becomes the sum (mean, maximum) over all. Nothing is sent."""
    a, b = chunks(x.size, host.size)[host.rank : host.rank + 2]
    return _between_meetings(host, arena, call, caller, lambda: _add(arena, x, x, a, b, op))


def all_reduce_into(host: Host, arena: DeviceArena, x: Place, into: Place, call: Call, caller: Caller) -> Algorithm:
    """Every segment's `into` becomes the sum of x over all, converted once; x stays as it was."""
    a, b = chunks(x.size, host.size)[host.rank : host.rank + 2]
    return _between_meetings(host, arena, call, caller, lambda: _add(arena, x, into, a, b, "sum"))


def reduce_scatter(
    host: Host, arena: DeviceArena, x: Place, op: Op, call: Call, bounds: Sequence[int], caller: Caller
) -> Algorithm:
    """Shard r of rank r's x becomes its sum over all ranks; the rest stays as it was."""
    a, b = bounds[host.rank : host.rank + 2]
    own = arena.rows[host.rank] + x.at(a)
    return _between_meetings(host, arena, call, caller, lambda: _add(arena, x, x, a, b, op, out=own))


def all_gather(
    host: Host, arena: DeviceArena, x: Place, call: Call, bounds: Sequence[int], caller: Caller
) -> Algorithm:
    """Every rank's shard r is written into all segments."""
    a, b = bounds[host.rank : host.rank + 2]

    def give() -> None:
        own = arena.rows[host.rank]
        for i in range(1, host.size):  # each begins with another neighbour
            row = arena.rows[(host.rank + i) % host.size]
            if b > a:
                arena.gpu.runtime.copy(row + x.at(a), own + x.at(a), (b - a) * x.itemsize, arena.stream)

    return _between_meetings(host, arena, call, caller, give)


def all_reduce_through_slots(
    host: Host, arena: DeviceArena, address: int, x: Place, op: Op, call: Call, caller: Caller
) -> Algorithm:
    """Every rank's x becomes the sum (mean, maximum) over all.

    Args:
        host: Where the ranks meet.
        arena: Whose slots are used.
        address: Of x: [size], contiguous, anywhere on the GPU.
        x: Its size and dtype.
        op: The operation.
        call: What was called.
        caller: Whose array it is.
    """
    runtime, own = arena.gpu.runtime, arena.rows[host.rank]
    caller.before(arena.stream)
    first: Call | None = call
    for a, b in list(segments(0, x.size, arena_module.SLOT_BYTES // x.itemsize)) or [(0, 0)]:
        slot, here = arena.slot, address + a * x.itemsize
        if b > a:
            runtime.copy(own + slot, here, (b - a) * x.itemsize, arena.stream)
        yield from arena.meet(host, first)
        first = None
        _add(arena, x._replace(offset=slot), x, 0, b - a, op, out=here)
    caller.after(arena.stream)


def chunks(size: int, n: int) -> list[int]:
    """Where the chunks of the ranks begin and end, [n + 1]: at whole lines of memory."""
    lines = chunk_bounds(-(-size // _CHUNK_ELEMENTS), n)
    return [min(line * _CHUNK_ELEMENTS, size) for line in lines]


def _between_meetings(
    host: Host, arena: DeviceArena, call: Call, caller: Caller, give: Callable[[], None]
) -> Algorithm:
    caller.before(arena.stream)
    yield from arena.meet(host, call)
    give()
    yield from arena.part(host)
    caller.after(arena.stream)


def _add(arena: DeviceArena, x: Place, into: Place, a: int, b: int, op: Op, out: int | None = None) -> None:
    """Elements [a, b) of all rows become one sum, in `out` or in all rows."""
    if a == b:
        return
    addition = Addition(
        rows=arena.rows,
        table=arena.table,
        source=x.at(a),
        target=into.at(a),
        out=out,
        size=b - a,
        dtype=x.dtype,
        into=into.dtype,
        op=op,
    )
    arena.gpu.runtime.add(addition, arena.stream)
