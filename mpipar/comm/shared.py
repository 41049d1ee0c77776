"""Collectives of the ranks of one host, in the memory that they share.

In the arena. What is to be reduced lies at the same offset in each rank's segment. Between two meetings, rank r adds up
chunk r over all segments and writes the sum into all of them, in one pass if that was compiled:

    segment of rank 0    [ chunk 0 | chunk 1 | chunk 2 ]        rank 1 reads its column,
    segment of rank 1    [ chunk 0 | chunk 1 | chunk 2 ]        adds it up,
    segment of rank 2    [ chunk 0 | chunk 1 | chunk 2 ]        writes it back
                                       rank 1

Each element is read n times and written n times, and passes through no buffer between: 2 n times the array's bytes of
memory traffic on the host, over all ranks.

Through slots, a block at a time, for an array elsewhere. Two ranks, or more with a small array, copy all of it there,
and each adds up all slots after a single meeting. Else a rank copies there what others will add up; after the meeting
it adds up its own chunk of them; and after a second it takes the others' sums. `one_call` has the same compiled.

All ranks get the same bits. Each function plans, and returns what begins the planned operation as often as it is
called.

n ranks    r this rank    a, b first and last element of a block
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.call import Call
from mpipar.comm.host import SLOT_BYTES, Host
from mpipar.comm.p2p import chunk_bounds, segments
from mpipar.comm.pending import Algorithm
from mpipar.comm.sums import Step, plan_copy, plan_sum, plan_sum_into, run

# Up to here more than two ranks take less time for adding up all slots than for meeting once more.
_ONE_MEETING_BYTES = 64 << 10
# Up to here it pays to bring an array of the arena to the slots for that. What is compiled meets sooner.
_TO_SLOTS_BYTES = 64 << 10
_TO_SLOTS_COMPILED_BYTES = 8 << 10
_TO_SLOTS_OF_TWO_BYTES = 4 << 10

Begin = Callable[[], Algorithm]


def all_reduce(host: Host, column: Sequence[Buffer], op: Op, call: Call) -> Begin:
    """Every segment's x becomes the sum (mean, maximum) over all. Nothing is sent."""
    mine, others = column[host.rank], _others(host, column)
    a, b = chunk_bounds(mine.size, host.size)[host.rank : host.rank + 2]
    steps = plan_sum((mine, a), [(buffer, a) for buffer in (mine, *others)], b - a, op, host.size, into=others)
    return lambda: _between_meetings(host, call, steps)


def all_reduce_into(host: Host, column: Sequence[Buffer], targets: Sequence[Buffer], call: Call) -> Begin:
    """Every segment's target becomes the sum of x over all, in the target's dtype; x stays as it was."""
    a, b = chunk_bounds(column[0].size, host.size)[host.rank : host.rank + 2]
    mine, others = column[host.rank], _others(host, column)
    steps = plan_sum_into([targets[host.rank], *_others(host, targets)], [mine, *others], a, b)
    return lambda: _between_meetings(host, call, steps)


def reduce_scatter(host: Host, column: Sequence[Buffer], op: Op, call: Call, bounds: Sequence[int]) -> Begin:
    """Shard r of rank r's x becomes its sum over all ranks; the rest stays as it was."""
    mine, others = column[host.rank], _others(host, column)
    a, b = bounds[host.rank : host.rank + 2]
    steps = plan_sum((mine, a), [(buffer, a) for buffer in (mine, *others)], b - a, op, host.size)
    return lambda: _between_meetings(host, call, steps)


def all_gather(host: Host, column: Sequence[Buffer], call: Call, bounds: Sequence[int]) -> Begin:
    """Every rank's shard r is written into all segments."""
    a, b = bounds[host.rank : host.rank + 2]
    mine = column[host.rank].values[a:b]
    steps = [plan_copy(other.values[a:b], mine) for other in _others(host, column)]
    return lambda: _between_meetings(host, call, steps)


def barrier(host: Host, call: Call) -> Algorithm:
    """Nobody leaves before all have entered. A generator: the rank enters when its turn in the lane has come."""
    yield from host.meet(call)


def after_meeting(host: Host, call: Call, algorithm: Algorithm) -> Algorithm:
    """An algorithm that sends messages, after a meeting that compares what the ranks have come for."""
    yield from host.meet(call)
    yield from algorithm


def pays_in_place(host: Host, x: Buffer, *, compiled: bool) -> bool:
    """Whether reducing x where it lies, with two meetings, takes less time than passing it through the slots."""
    of_more = _TO_SLOTS_COMPILED_BYTES if compiled else _TO_SLOTS_BYTES
    return x.size * x.itemsize > (_TO_SLOTS_OF_TWO_BYTES if host.size == 2 else of_more)


def takes_one_meeting(host: Host, x: Buffer) -> bool:
    """Whether each rank adds up all slots itself."""
    return host.size == 2 or x.size * x.itemsize <= _ONE_MEETING_BYTES


def all_reduce_through_slots(host: Host, x: Buffer, op: Op, call: Call) -> Begin:
    """Every rank's x, wherever it lies, becomes the sum (mean, maximum) over all. Nothing is sent."""
    plan = _plan_one_meeting if takes_one_meeting(host, x) else _plan_two_meetings
    # Of an empty array too there is one block, to meet for.
    blocks = list(segments(0, x.size, SLOT_BYTES // x.itemsize)) or [(0, 0)]
    phases = [[plan(host, host.slots(x.dtype, turn), x, a, b, op) for turn in (0, 1)] for a, b in blocks]
    return lambda: _block_by_block(host, phases, x, call)


def _between_meetings(host: Host, call: Call, steps: list[Step]) -> Algorithm:
    yield from host.meet(call)
    run(steps)
    yield from host.meet()


def _block_by_block(host: Host, phases: list[list[list[list[Step]]]], x: Buffer, call: Call | None) -> Algorithm:
    for by_turn in phases:
        first, *others = by_turn[host.take_turn()]
        run(first)
        for steps in others:
            yield from host.meet(call)
            call = None
            run(steps)
    x.commit()


def _plan_one_meeting(host: Host, slots: Sequence[Buffer], x: Buffer, a: int, b: int, op: Op) -> list[list[Step]]:
    """What is done before the meeting, and after."""
    before = plan_copy(slots[host.rank].values[: b - a], x.values[a:b])
    return [[before], plan_sum((x, a), [(slot, 0) for slot in slots], b - a, op, host.size)]


def _plan_two_meetings(host: Host, slots: Sequence[Buffer], x: Buffer, a: int, b: int, op: Op) -> list[list[Step]]:
    """What is done before the meetings, between, and after."""
    mine, bounds = slots[host.rank], chunk_bounds(b - a, host.size)
    own, end = bounds[host.rank : host.rank + 2]
    sources = [(x, a + own), *((slot, own) for slot in _others(host, slots))]
    before = [plan_copy(mine.values[s:e], x.values[a + s : a + e]) for s, e in ((0, own), (end, b - a)) if s < e]
    between = plan_sum((mine, own), sources, end - own, op, host.size)
    between.append(plan_copy(x.values[a + own : a + end], mine.values[own:end]))
    after = [
        plan_copy(x.values[a + start : a + stop], slot.values[start:stop])
        for slot, start, stop in zip(slots, bounds, bounds[1:], strict=False)
        if slot is not mine
    ]
    return [before, between, after]


def _others(host: Host, column: Sequence[Buffer]) -> list[Buffer]:
    return [buffer for rank, buffer in enumerate(column) if rank != host.rank]
