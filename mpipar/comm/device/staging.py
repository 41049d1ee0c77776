"""An array on a GPU, through pinned memory of the host: piece by piece, on streams of their own.

What MPI and the algorithms see is the host's copy. Down the pieces come in the order in which the algorithm will want
them, each with an event; whoever touches elements waits for the pieces that they are in, and for no others. Up goes
what is final, at once. Both ways are open at a time:

    caller's stream    ..x is made..|                                            waits | x is used ..
    down stream               waits | piece 1 | piece 2 | piece 3 |                ^
    host                                   sends 1  sends 2   adds up 3            |
    up stream                 waits |               | piece 2 | piece 1 | piece 3 -+

The copy is kept for the next operation. What is only received is not brought down first.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from mpipar.comm.buffers import Buffer, Op, addable
from mpipar.comm.device.gpu import Gpu, Mark
from mpipar.comm.device.on_gpu import OnGpu
from mpipar.comm.mpi import MPI
from mpipar.comm.p2p import segments
from mpipar.comm.pending import Pending

PIECE_BYTES = 4 << 20


class Piece(NamedTuple):
    """Elements [start, stop) that are on their way down, and the mark behind which they are there."""

    start: int
    stop: int
    mark: Mark


class Staged(OnGpu):
    """The copy in the host's memory of one array, for one operation.

    Args:
        gpu: Where the array is.
        array: A torch tensor or CuPy array.
        writable: Whether the operation writes into it.
        reads: Whether it reads what is in it.
    """

    __slots__ = ("__weakref__", "_began", "_down", "_expected", "_host", "_reads", "_settled", "_up")

    def __init__(self, gpu: Gpu, array: Any, *, writable: bool = True, reads: bool = True):
        super().__init__(gpu, array, writable=writable)
        self._reads = reads
        self._expected = not reads  # whether it is known what has to come down
        self._began = False
        self._settled = False
        self._host: _Copy | None = None
        self._down: list[Piece] = []
        self._up = 0

    @property
    def is_in_host_memory(self) -> bool:
        return True

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """What will be read, in this order; nothing else is brought down."""
        self._expected = True
        self._begin()
        if self._reads:
            for start, stop in ranges:
                self._bring(start, stop)

    def coming(self, start: int, stop: int) -> list[Pending]:
        return [piece.mark for piece in self._on_the_way(start, stop)]

    def wait_for(self, start: int, stop: int) -> None:
        """Until elements [start, stop) are here, those of them that are to come."""
        for piece in self._on_the_way(start, stop):
            piece.mark.wait()
            self._down.remove(piece)

    def message(self, start: int, stop: int) -> tuple[Any, MPI.Datatype]:
        self.wait_for(start, stop)
        return super().message(start, stop)

    def combine(self, start: int, stop: int, op: Op, other: Buffer) -> None:
        self.wait_for(start, stop)
        super().combine(start, stop, op, other)

    def scale(self, start: int, stop: int, factor: float) -> None:
        self.wait_for(start, stop)
        super().scale(start, stop, factor)

    def replace(self, start: int, stop: int, source: Buffer, first: int) -> None:
        source.wait_for(first, first + stop - start)
        self.wait_for(start, stop)
        super().replace(start, stop, source, first)

    def settle(self, start: int, stop: int) -> None:
        """Elements [start, stop) are final: they go up while the operation goes on."""
        if self._writable and stop > start:
            self._settled = True
            self._lift(start, stop)

    def convert(self, other: Buffer) -> None:
        other.wait_for(0, other.size)
        self._expected = True
        self._begin()
        super().convert(other)

    def commit(self) -> None:
        """The caller's stream waits for what went up; if nothing was settled, all of it goes up now."""
        if not self._writable:
            return
        if not self._settled:
            self.wait_for(0, self.size)
            for start, stop in segments(0, self.size, PIECE_BYTES // self.itemsize):
                self._lift(start, stop)
        if self._began:
            self.caller.after(self._up)
        self.put_back()

    def _on_the_way(self, start: int, stop: int) -> list[Piece]:
        if not self._expected:
            self.expect(segments(0, self.size, PIECE_BYTES // self.itemsize))
        self._begin()
        return [piece for piece in self._down if piece.start < stop and start < piece.stop]

    def _begin(self) -> None:
        """Gets the memory, when the operation's turn has come: those that wait in a lane hold none."""
        if self._began:
            return
        self._began = True
        self._up = self.gpu.stream("up")
        self.caller.before(self.gpu.stream("down"), self._up)
        self._host = _Copy(self.gpu, self.size * self.itemsize)
        weakref.finalize(self, self._host.give_back).atexit = False
        self.lib, self.values = addable(self._host.view(self.dtype, self.size), self.dtype)

    def _bring(self, start: int, stop: int) -> None:
        if stop > start:
            assert self._host is not None
            place, num_bytes, down = start * self.itemsize, (stop - start) * self.itemsize, self.gpu.stream("down")
            self.gpu.runtime.copy(self._host.address + place, self.address + place, num_bytes, down)
            self._down.append(Piece(start, stop, self.gpu.mark(down)))

    def _lift(self, start: int, stop: int) -> None:
        assert self._host is not None
        place, num_bytes = start * self.itemsize, (stop - start) * self.itemsize
        self.gpu.runtime.copy(self.address + place, self._host.address + place, num_bytes, self._up)


class _Copy:
    """Pinned memory, for as long as an operation, or MPI, has to do with it."""

    def __init__(self, gpu: Gpu, num_bytes: int):
        self.address, self._size = gpu.pinned.take(num_bytes)
        self._gpu = gpu

    def view(self, dtype: str, size: int) -> Any:
        """[size] of this dtype."""
        words = np.ctypeslib.as_array((ctypes.c_uint8 * (size * Buffer.itemsize_of(dtype))).from_address(self.address))
        return torch.from_numpy(words).view(torch.bfloat16) if dtype == "bfloat16" else words.view(dtype)

    def give_back(self) -> None:
        """To the next operation, which waits until nothing is copied from it or to it any more."""
        gpu = self._gpu
        marks = [gpu.mark(gpu.stream(purpose)) for purpose in ("down", "up")]
        gpu.pinned.give(self.address, self._size, marks)
