"""The arena: memory in which the ranks of one host reduce in place, without copies in or out.

Every rank has a segment of the arena and sees those of its neighbours. What is to be reduced lies at the same offset in
each. Between two barriers, rank r adds up chunk r over all segments and writes the sum into all of them:

    segment of rank 0    [ chunk 0 | chunk 1 | chunk 2 ]        rank 1 reads its column,
    segment of rank 1    [ chunk 0 | chunk 1 | chunk 2 ]        adds it up a cache-sized
    segment of rank 2    [ chunk 0 | chunk 1 | chunk 2 ]        run at a time, writes it back
                                       rank 1

Each element is read n times and written n times, and passes through no buffer between: 2 n times the array's bytes of
memory traffic on the host, over all ranks.

The memory has no name in any file system, so it is gone when the last process is, however that one ends. Ranks wait
for each other in messages, with MPI's progress and a deadline, not on flags in the memory: a dead neighbour is noticed.

n ranks    r this rank    a, b first and last element of a run
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpipar.comm.buffers import Buffer, Op, accumulate
from mpipar.comm.p2p import Wire, barrier, segments
from mpipar.comm.progress import Algorithm
from mpipar.comm.ring import chunk_bounds

_RUN_BYTES = 128 << 10  # of each segment: all n of them, for the usual n, stay in a core's second-level cache
_ALIGNMENT = 4096
_MARK_BYTES = 16


class Arena:
    """The segments of the ranks of one host. `Communicator.open_arena` makes it.

    Args:
        segments: The mapped segments by rank, all of one size.
        rank: Whose segment is this process's own.
    """

    def __init__(self, segments: list[mmap.mmap], rank: int):
        self._segments = segments
        self._own = np.frombuffer(segments[rank], np.uint8)
        self._used = 0
        self._columns: dict[tuple[int, int, str], list[Buffer]] = {}

    def allocate(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[elements] zeros in this rank's segment. Ranks that make the same calls get the same offsets.

        Raises:
            MemoryError: The segment is used up.
        """
        assert device.type == "cpu"
        start, num_bytes = self._used, elements * dtype.itemsize
        if start + num_bytes > self._own.size:
            raise MemoryError(f"the arena has {self._own.size - start:,} bytes left where {num_bytes:,} are wanted")
        self._used = _aligned(start + num_bytes)
        return torch.from_numpy(self._own[start : start + num_bytes]).view(dtype)

    def column(self, x: Buffer) -> list[Buffer] | None:
        """What lies where x lies, in the segment of each rank; None if x is not in this rank's."""
        offset = x.address - self._own.ctypes.data
        if x.size == 0 or not 0 <= offset < self._own.size:
            return None
        key = offset, x.size, x.dtype
        if key not in self._columns:
            self._columns[key] = [Buffer(_view(segment, *key)) for segment in self._segments]
        return self._columns[key]


def arena_bytes(sizes: list[int]) -> int:
    """How large a segment has to be for allocations of so many bytes, one after the other."""
    return sum(_aligned(size) for size in sizes)


def open_arena(exchange: Callable[[Any], list[Any]], rank: int, num_bytes: int) -> Arena | str:
    """Collective: an arena of `num_bytes` a rank, or on all ranks the reason why there can be none.

    Args:
        exchange: Gives every rank the objects of all, by rank.
        rank: This process's own.
        num_bytes: The size of each segment.
    """
    descriptor = -1
    segments: list[mmap.mmap] = []
    handle: Handle | str
    try:
        handle = _create_segment(num_bytes)
        descriptor = handle.descriptor
    except OSError as error:
        handle = f"{num_bytes:,} bytes of shared memory cannot be had: {error.strerror}"
    handles: list[Handle | str] = exchange(handle)
    problem = next((text for text in handles if isinstance(text, str)), None)
    try:
        if problem is None:
            segments = [_map_segment(handle, num_bytes) for handle in handles if isinstance(handle, Handle)]
    except OSError as error:
        problem = f"a neighbour's memory cannot be opened: {error.strerror}"
    problems: list[str | None] = exchange(problem)
    problem = next((text for text in problems if text is not None), None)
    if descriptor >= 0:
        os.close(descriptor)  # the memory lives on in the maps
    if problem is not None:
        return problem
    segments[rank][:_MARK_BYTES] = bytes(_MARK_BYTES)
    return Arena(segments, rank)


def all_reduce(wire: Wire, column: list[Buffer], op: Op) -> Algorithm:
    """Every segment's x becomes the sum (mean, maximum) over all. Bytes sent: none but the barriers' empty messages."""
    yield from barrier(wire)
    a, b = _chunk(wire, column)
    _add_up(column, wire.rank, a, b, op, everywhere=True)
    yield from barrier(wire)


def reduce_scatter(wire: Wire, column: list[Buffer], op: Op) -> Algorithm:
    """Chunk r of rank r's x becomes its sum over all ranks; the rest stays as it was."""
    yield from barrier(wire)
    a, b = _chunk(wire, column)
    _add_up(column, wire.rank, a, b, op, everywhere=False)
    yield from barrier(wire)


def all_gather(wire: Wire, column: list[Buffer]) -> Algorithm:
    """Every rank's chunk r is written into all segments."""
    yield from barrier(wire)
    a, b = _chunk(wire, column)
    own = column[wire.rank].values[a:b]
    for rank, buffer in enumerate(column):
        if rank != wire.rank:
            buffer.values[a:b] = own
    yield from barrier(wire)


def _add_up(column: list[Buffer], own: int, start: int, stop: int, op: Op, *, everywhere: bool) -> None:
    """Reduces elements [start, stop) over the column, the own first, into the own segment or into all."""
    mine = column[own]
    others = [buffer for rank, buffer in enumerate(column) if rank != own]
    # A sum of 16-bit floats is kept in 32 bits until it is whole.
    wide = mine.dtype in ("float16", "bfloat16") and op != "max"
    for a, b in segments(start, stop, max(1, _RUN_BYTES // mine.itemsize)):
        total = mine.values[a:b].float() if wide else mine.values[a:b]
        for other in others:
            accumulate(mine.lib, op, total, other.values[a:b])
        if op == "mean":
            total *= 1 / len(column)
        if wide:
            mine.values[a:b] = total
        if everywhere:
            for other in others:
                other.values[a:b] = mine.values[a:b]


def _chunk(wire: Wire, column: list[Buffer]) -> tuple[int, int]:
    bounds = chunk_bounds(column[0].size, wire.size)
    return bounds[wire.rank], bounds[wire.rank + 1]


class Handle(NamedTuple):
    """Where another process finds a segment, and how it knows that it is the right one."""

    process: int
    descriptor: int
    mark: bytes


def _create_segment(num_bytes: int) -> Handle:
    """New memory that has no name, reserved as a whole: else touching more than there is would be a SIGBUS."""
    mark = secrets.token_bytes(_MARK_BYTES)
    descriptor = os.memfd_create("mpipar-arena")
    try:
        os.posix_fallocate(descriptor, 0, max(num_bytes, _MARK_BYTES))
        os.pwrite(descriptor, mark, 0)
    except OSError:
        os.close(descriptor)
        raise
    return Handle(os.getpid(), descriptor, mark)


def _map_segment(handle: Handle, num_bytes: int) -> mmap.mmap:
    """The segment of another rank. Ranks of one host can be in containers of their own, where a number is another's."""
    opened = os.open(f"/proc/{handle.process}/fd/{handle.descriptor}", os.O_RDWR)
    try:
        if os.pread(opened, _MARK_BYTES, 0) != handle.mark:
            raise OSError(errno.ESRCH, "it is not the neighbour's")
        return mmap.mmap(opened, max(num_bytes, _MARK_BYTES))
    finally:
        os.close(opened)


def _view(segment: mmap.mmap, offset: int, size: int, dtype: str) -> Any:
    if dtype == "bfloat16":
        return torch.frombuffer(segment, dtype=torch.bfloat16, count=size, offset=offset)
    return np.frombuffer(segment, dtype, size, offset)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
