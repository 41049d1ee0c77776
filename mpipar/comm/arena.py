"""Memory that the ranks of one host share: a segment of each rank, mapped by all of them.

An array at one place in the segments of all is a column: its rows can be added up where they are.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpipar.comm.buffers import Buffer
from mpipar.comm.segment import Exchange, open_segments

_ALIGNMENT = 4096
# Rows of a column are read side by side. Where they lie a power of two apart in memory, the lines of all would fall on
# one bank of it and into one set of the caches, and take ten times as long; so each segment begins elsewhere in a page.
_STAGGER_BYTES = 4096 + 64
_NUM_BEGINNINGS = 16  # as many rows as are read side by side at the most (see `adding`); more ranks share them
_MOST_COLUMNS = 1024  # that are remembered


class Arena:
    """The segments of the ranks of one host. `Communicator.open_arena` makes it.

    Args:
        segments: The memory of the segments by rank, all of one size.
        rank: Whose segment is this process's own.
    """

    def __init__(self, segments: list[memoryview], rank: int):
        self._segments = segments
        self._rank = rank
        self._own = np.frombuffer(segments[rank], np.uint8)
        self._address: int = self._own.ctypes.data
        self._used = 0
        self._columns: dict[tuple[int, int, str], list[Buffer]] = {}

    def less(self, kept: list[int]) -> Arena:
        """The same with some of its segments, this process's among them: `kept` are their numbers here."""
        arena = Arena([self._segments[i] for i in kept], kept.index(self._rank))
        arena._used = self._used
        return arena

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

    def offset(self, x: Buffer) -> int | None:
        """Where x begins in this rank's segment, in bytes; None if it is not there."""
        offset = x.address - self._address
        return offset if x.size and 0 <= offset < self._own.size else None

    def column(self, x: Buffer) -> list[Buffer] | None:
        """What lies where x lies, in the segment of each rank; None if x is not in this rank's."""
        offset = self.offset(x)
        if offset is None:
            return None
        key = offset, x.size, x.dtype
        if key not in self._columns:
            if len(self._columns) == _MOST_COLUMNS:
                self._columns.clear()
            self._columns[key] = self.column_at(*key)
        return self._columns[key]

    def column_at(self, offset: int, size: int, dtype: str) -> list[Buffer]:
        """`size` elements at an offset in bytes, in the segment of each rank."""
        return [Buffer(_view(segment, offset, size, dtype)) for segment in self._segments]

    def words_at(self, offset: int, count: int) -> list[memoryview]:
        """`count` 64-bit words at an offset in bytes, in the segment of each rank."""
        return [segment[offset : offset + 8 * count].cast("Q") for segment in self._segments]


def arena_bytes(sizes: list[int]) -> int:
    """How large a segment has to be for allocations of so many bytes, one after the other."""
    return sum(_aligned(size) for size in sizes)


def open_arena(exchange: Exchange, rank: int, num_bytes: int) -> Arena | str:
    """Collective: an arena of `num_bytes` a rank, or on all ranks the reason why there can be none.

    Args:
        exchange: Between the ranks of the host.
        rank: This process's own.
        num_bytes: The size of each segment.
    """
    segments = open_segments(exchange, num_bytes + _STAGGER_BYTES * (_NUM_BEGINNINGS - 1))
    if isinstance(segments, str):
        return segments
    for segment in segments:
        os.close(segment.descriptor)  # the memory lives on in the maps
    begins = [i % _NUM_BEGINNINGS * _STAGGER_BYTES for i in range(len(segments))]
    return Arena([memoryview(memory)[a : a + num_bytes] for a, (_, memory) in zip(begins, segments, strict=True)], rank)


def _view(segment: memoryview, offset: int, size: int, dtype: str) -> Any:
    if dtype == "bfloat16":
        return torch.frombuffer(segment, dtype=torch.bfloat16, count=size, offset=offset)
    return np.frombuffer(segment, dtype, size, offset)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
