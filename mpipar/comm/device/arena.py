"""Memory of GPUs that the ranks of one host open in each other.

Each rank has a segment: one allocation of its own, for a handle of CUDA's names a whole allocation. Where several ranks
share a GPU it is the same memory under other addresses; on GPUs of their own the ranks read each other's over the
links between them.

    segment    | slot | slot | arrays, in the order of their allocation |

Who waits for whom. A rank's *host* meets its neighbours at flags, as it does for arrays in the host's memory
(`host.Host`), and never waits for a device. The *streams* wait for each other at events that processes share:

    rank 0's stream   ..x is made | arrived 0 |         waits for arrived 1 | kernel | done 0 | waits for done 1 | ..
    rank 0's host            recorded    meets            given               given    recorded   meets, given
    rank 1's stream      ..x is made | arrived 1 |      waits for arrived 0 | kernel | done 1 | waits for done 0 | ..

A wait is for what an event stands for when the wait is given. So a neighbour's event must have been recorded before
the wait is given, and must not be recorded again before. Both follow from the meetings:

- *Recorded before.* A rank records, then comes to the meeting; a neighbour gives its waits when it has left it.
- *Not again before.* There are two `arrived` events, taken in turn. To record one again, a rank has left the meeting of
  the other one, to which every neighbour came after it had given its waits for the first. `done` is recorded again
  after the meeting for the next arrival, to which every neighbour came after it had given its waits for `done`.
- *Slots*, taken in the same turn, are written again when the stream has waited for the neighbours' next arrival, which
  they recorded behind the kernel that read the slot.

If ranks may die and be survived, a stream that waits for an event of the dead would wait for ever, and CUDA promises
nothing of an event whose process is gone. Then there are no shared events. The host waits until its own stream is done,
in the loop that looks at the clock and for deaths, and comes to the meeting after that: what a neighbour's host gives
its stream behind the meeting then begins behind what is done. The order in which memory may be written again is the
same as above, for to come to a meeting is to have done what was given before it.

Memory is given back in this order: a rank's stream is done; it closes its neighbours' memory; all have come to say so;
the rank frees its own, when the last tensor in it is gone. What was never closed is left to the end of the process, for
a neighbour may be using it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mpipar.comm.call import Call
from mpipar.comm.device.gpu import Gpu
from mpipar.comm.device.runtime import DeviceError, Runtime
from mpipar.comm.host import Host
from mpipar.comm.pending import Finish, Pending
from mpipar.comm.segment import Exchange

ALIGNMENT = 512
_BLOCK_BYTES = 2 << 20  # CUDA cuts smaller allocations out of blocks of this size, and a handle opens the whole block
SLOT_BYTES = 4 << 20
_WORD_BYTES = 8
_PURPOSE = "arena"  # of the stream


class Place(NamedTuple):
    """An array in the arena: where it begins in each segment, in bytes, and its elements."""

    offset: int
    size: int
    dtype: str
    itemsize: int

    def at(self, element: int) -> int:
        """Where an element begins."""
        return self.offset + element * self.itemsize


class Segment:
    """This process's own. It is freed with the last tensor in it, once no neighbour has it open."""

    def __init__(self, runtime: Runtime, num_bytes: int):
        self.address = runtime.allocate(num_bytes)
        self.num_bytes = num_bytes
        self._closed: list[bool] = []  # not empty: by all neighbours
        # At the end of the process CUDA is gone before this, and frees all that is left.
        weakref.finalize(self, _free, runtime, self.address, self._closed).atexit = False

    def closed_by_all(self) -> None:
        """No neighbour has it open any more."""
        self._closed.append(True)


def _free(runtime: Runtime, address: int, closed: list[bool]) -> None:
    if closed:
        runtime.free(address)


@dataclass(frozen=True)
class Member:
    """A rank of the arena, as this process sees it.

    Args:
        address: Of its segment.
        events: Two for `arrived`, and one for `done`; none if ranks may die and be survived.
    """

    address: int
    events: tuple[int, ...]


_DONE = 2  # its place among the events


class DeviceArena:
    """The segments of the ranks of one host. `Communicator.open_arena` makes it.

    Args:
        gpu: On which this rank's segment is.
        members: By rank.
        rank: Which of them this process is.
        segment: Its own.
        careful: Whether ranks may die and be survived.

    Attributes:
        rows: The addresses of the segments, by rank.
        table: Where the same addresses lie in this GPU's memory.
        rank: This process among them.
        stream: What works in the arena, in the order in which it is given.
    """

    def __init__(self, gpu: Gpu, members: list[Member], rank: int, segment: Segment, *, careful: bool):
        self.gpu = gpu
        self.rank = rank
        self.rows = tuple(member.address for member in members)
        self.stream = gpu.stream(_PURPOSE)
        self.table, self._table_on_host = _table(gpu, self.rows, self.stream)
        self._members = members
        self._others = [member for index, member in enumerate(members) if index != rank]
        self._own = members[rank]
        self._segment: Segment | None = segment
        self._careful = careful
        self._start = segment.address
        self._num_bytes = segment.num_bytes
        self._used = 2 * SLOT_BYTES
        self._turn = 0

    def less(self, kept: list[int]) -> DeviceArena:
        """The same with some of its segments, this process's among them: `kept` are their numbers here.

        This one is not to be used any more, and was waited for (`through`): so when all who are kept have come back
        from here nobody writes into anybody's memory.
        """
        assert self._segment is not None
        for index, member in enumerate(self._members):
            if index not in kept:
                with suppress(DeviceError):  # CUDA promises nothing of what was a dead process's
                    self._close(member)
        self._free_table()
        members = [self._members[index] for index in kept]
        arena = DeviceArena(self.gpu, members, kept.index(self.rank), self._segment, careful=self._careful)
        arena._used = self._used
        self._segment = None
        return arena

    def allocate(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[elements] zeros in this rank's segment. Ranks that make the same calls get the same offsets.

        Raises:
            MemoryError: The segment is used up.
        """
        assert device.type == "cuda" and self._segment is not None
        start, num_bytes = self._used, elements * dtype.itemsize
        left = self._num_bytes - start
        if num_bytes > left:
            raise MemoryError(f"the arena has {left:,} bytes left where {num_bytes:,} are wanted")
        self._used = aligned(start + num_bytes)
        if num_bytes == 0:
            return torch.empty(0, dtype=dtype, device=device)
        return self.gpu.runtime.tensor(self._start + start, num_bytes, self._segment).view(dtype)

    def offset(self, address: int, num_bytes: int) -> int | None:
        """Where memory begins in this rank's segment, in bytes; None if it is not there."""
        offset = address - self._start
        return offset if num_bytes and offset >= 0 and offset + num_bytes <= self._num_bytes else None

    def meet(self, host: Host, call: Call | None) -> Iterator[Pending]:
        """What all have given their streams before is done before what this rank gives its own from now on.

        Args:
            host: Where the ranks meet.
            call: What this rank has come for.
        """
        self._turn ^= 1
        yield from self._wait_for_all(host, call, self._turn)

    @property
    def slot(self) -> int:
        """Where the slot is, in each segment, that is this rank's to fill before the next meeting and to be read after
        it, until the one after that."""
        return (self._turn ^ 1) * SLOT_BYTES

    def part(self, host: Host) -> Iterator[Pending]:
        """The same, at the end of what all do in each other's memory."""
        yield from self._wait_for_all(host, None, _DONE)

    def through(self) -> Iterator[Pending]:
        """To wait until this rank has done on the GPU what it was to do in the segments."""
        return self.gpu.through(self.stream)

    def close(self) -> None:
        """The neighbours' memory is not used here any more; what was done there is waited for."""
        for member in self._others:
            self._close(member)

    def release(self) -> None:
        """All have closed it: own memory is freed with the last tensor."""
        assert self._segment is not None
        self._segment.closed_by_all()
        self._segment = None
        for event in self._own.events:
            self.gpu.runtime.destroy_event(event)
        self._free_table()

    def _wait_for_all(self, host: Host, call: Call | None, event: int) -> Iterator[Pending]:
        if self._careful:
            yield from self.gpu.through(self.stream)
            yield from host.meet(call)
            return
        self.gpu.runtime.record(self._own.events[event], self.stream)
        yield from host.meet(call)
        for member in self._others:
            self.gpu.runtime.wait(self.stream, member.events[event])

    def _free_table(self) -> None:
        self.gpu.runtime.free(self.table)
        self.gpu.runtime.free_pinned(self._table_on_host)

    def _close(self, member: Member) -> None:
        """Closes what was opened of a neighbour."""
        self.gpu.runtime.close_memory(member.address)
        for event in member.events:
            self.gpu.runtime.destroy_event(event)


class Handles(NamedTuple):
    """What a rank tells its neighbours."""

    gpu: str
    memory: bytes
    events: tuple[bytes, ...]


def open_device_arena(
    exchange: Exchange, finish: Finish, gpu: Gpu, rank: int, num_bytes: int, *, careful: bool
) -> DeviceArena | str:
    """Collective: an arena of `num_bytes` a rank on the GPUs, or on all ranks the reason why there can be none.

    Args:
        exchange: Between the ranks of the host.
        finish: Runs what this rank waits for alone.
        gpu: This rank's.
        rank: This process among them.
        num_bytes: Of arrays, in each segment.
        careful: Whether ranks may die and be survived.
    """
    runtime = gpu.runtime
    size = -(-(aligned(num_bytes) + 2 * SLOT_BYTES) // _BLOCK_BYTES) * _BLOCK_BYTES
    segment: Segment | None = None
    events: tuple[int, ...] = ()
    mine: Handles | str
    try:
        segment = Segment(runtime, size)
        runtime.zero(segment.address, size, gpu.stream(_PURPOSE))
        finish(gpu.through(gpu.stream(_PURPOSE)))
        events = () if careful else tuple(runtime.event(shared=True) for _ in range(_DONE + 1))
        handles_of_events = tuple(runtime.export_event(event) for event in events)
        mine = Handles(runtime.name, runtime.export_memory(segment.address), handles_of_events)
    except DeviceError as error:
        mine = f"{size:,} bytes of GPU memory cannot be shared: {error}"
    everybody: list[Handles | str] = exchange(mine)
    problem = next((handles for handles in everybody if isinstance(handles, str)), None)
    members: list[Member] = []
    try:
        for index, handles in enumerate(everybody):
            if problem is not None or isinstance(handles, str):
                break
            if index == rank:
                assert segment is not None
                members.append(Member(segment.address, events))
                continue
            problem = runtime.unreachable(handles.gpu)
            if problem is None:
                members.append(_open(runtime, handles))
    except DeviceError as error:
        problem = f"a neighbour's GPU memory cannot be opened: {error}"
    problems: list[str | None] = exchange(problem)
    problem = next((text for text in problems if text is not None), None)
    if problem is None:
        assert segment is not None
        return DeviceArena(gpu, members, rank, segment, careful=careful)
    for member in members:
        if segment is None or member.address != segment.address:
            runtime.close_memory(member.address)
            for event in member.events:
                runtime.destroy_event(event)
    exchange(None)  # now nobody has this rank's memory open
    if segment is not None:
        segment.closed_by_all()
    for event in events:
        runtime.destroy_event(event)
    return problem


def _open(runtime: Runtime, handles: Handles) -> Member:
    address = runtime.open_memory(handles.memory)
    opened: list[int] = []
    try:
        for handle in handles.events:
            opened.append(runtime.open_event(handle))
    except DeviceError:
        for event in opened:
            runtime.destroy_event(event)
        runtime.close_memory(address)
        raise
    return Member(address, tuple(opened))


def _table(gpu: Gpu, rows: tuple[int, ...], stream: int) -> tuple[int, int]:
    """The addresses, in the memory of the device, for what this stream is given from now on; and in pinned memory,
    from which they are copied some time."""
    num_bytes = _WORD_BYTES * len(rows)
    table, on_host = gpu.runtime.allocate(num_bytes), gpu.runtime.pinned(num_bytes)
    (ctypes.c_uint64 * len(rows)).from_address(on_host)[:] = list(rows)
    gpu.runtime.copy(table, on_host, num_bytes, stream)
    return table, on_host


def aligned(num_bytes: int) -> int:
    """How much of the segment an allocation of so many bytes takes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
