"""The memory of a stand-in: allocations that other processes open, and pinned memory of the host."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
from typing import Any

import numpy as np

from mpipar.comm import segment
from mpipar.comm.device.runtime import DeviceError
from tests.stand_in.board import Board, Misuse, Span

_NEW = 0xA5  # what is in memory that nobody has written


class DeviceMemory:
    """That of the device which one process has allocated or opened.

    Args:
        board: What the processes know of each other.
    """

    def __init__(self, board: Board):
        self._board = board
        self._me = board.process
        self._maps: dict[int, tuple[mmap.mmap, int, Span]] = {}  # by address: memory, descriptor, whole span
        self._handles: dict[int, bytes] = {}  # of what is this process's own
        self._num_allocations = 0

    def allocate(self, num_bytes: int) -> int:
        try:
            handle = segment._create(num_bytes)
        except OSError as error:
            raise DeviceError(f"cudaErrorMemoryAllocation: {error.strerror}") from error
        memory = mmap.mmap(handle.descriptor, num_bytes)
        memory[:] = bytes([_NEW]) * num_bytes
        number, self._num_allocations = self._num_allocations, self._num_allocations + 1
        entry = self._board.own["allocations"][number]
        entry["live"], entry["num_bytes"] = 1, num_bytes
        address = _address(memory)
        self._handles[address] = pickle.dumps((self._me, number, num_bytes, tuple(handle)))
        self._maps[address] = memory, handle.descriptor, Span(self._me, number, 0, num_bytes)
        return address

    def free(self, address: int) -> None:
        if address not in self._handles:
            raise Misuse("freed twice, or what was never allocated")
        memory, descriptor, span = self._maps.pop(address)
        entry = self._board.own["allocations"][span.number]
        if entry["opened"].any():
            raise Misuse(f"freed while processes {np.flatnonzero(entry['opened']).tolist()} have it open")
        entry["live"] = 0
        del self._handles[address], memory
        os.close(descriptor)

    def export(self, address: int) -> bytes:
        return self._handles[address]

    def open(self, handle: bytes) -> int:
        owner, number, num_bytes, where = pickle.loads(handle)
        if owner == self._me:
            raise Misuse("a process opens its own memory")
        entry = self._board.parts[owner]["allocations"][number]
        if not entry["live"]:
            raise Misuse("opened after it was freed")
        opened = segment._open(segment.Handle(*where), num_bytes)
        entry["opened"][self._me] += 1
        address = _address(opened.memory)
        self._maps[address] = opened.memory, opened.descriptor, Span(owner, number, 0, num_bytes)
        return address

    def close(self, address: int) -> None:
        if address not in self._maps or address in self._handles:
            raise Misuse("closed twice, or what was never opened")
        _, descriptor, span = self._maps.pop(address)
        self._board.parts[span.owner]["allocations"][span.number]["opened"][self._me] -= 1
        os.close(descriptor)

    def holds(self, address: int, num_bytes: int) -> bool:
        """Whether that is memory of the device."""
        return self._find(address, num_bytes) is not None

    def span(self, address: int, num_bytes: int) -> Span:
        """Which memory that is, to all processes."""
        span = self._find(address, num_bytes)
        if span is None:
            raise Misuse("a kernel uses memory that is not the device's, or that is closed")
        return span

    def _find(self, address: int, num_bytes: int) -> Span | None:
        for start, (_, _, whole) in self._maps.items():
            offset = address - start
            if offset >= 0 and offset + num_bytes <= whole.stop:
                return Span(whole.owner, whole.number, offset, offset + num_bytes)
        return None


class PinnedMemory:
    """That of the host, of one process."""

    def __init__(self) -> None:
        self._blocks: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def allocate(self, num_bytes: int) -> int:
        memory = (ctypes.c_uint8 * num_bytes)()
        ctypes.memset(memory, _NEW, num_bytes)
        address = ctypes.addressof(memory)
        self._blocks[address] = memory
        return address

    def free(self, address: int) -> None:
        if self._blocks.pop(address, None) is None:
            raise Misuse("pinned memory is freed twice, or was never allocated")

    def holds(self, address: int, num_bytes: int) -> bool:
        return any(
            start <= address and address + num_bytes <= start + len(memory) for start, memory in self._blocks.items()
        )


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_uint8.from_buffer(memory))
