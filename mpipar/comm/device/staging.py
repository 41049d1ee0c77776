"""An array on a GPU, through pinned memory of the host: piece by piece, on streams of their own.

What MPI and the algorithms see is the host's copy. Down the pieces come in the order in which the algorithm will want
them, each with an event; an algorithm that touches elements waits for the pieces that they are in, and for no others
(`coming`). Up goes what is final, at once. Both ways are open at a time:

    caller's stream    ..x is made..|                                            waits | x is used ..
    down stream               waits | piece 1 | piece 2 | piece 3 |                ^
    host                                   sends 1  sends 2   adds up 3            |
    up stream                 waits |               | piece 2 | piece 1 | piece 3 -+

The copy is kept for the next operation. What is only received is not brought down first.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from mpipar.comm.buffers import Buffer, Op, addable
from mpipar.comm.device.gpu import Gpu, Mark
from mpipar.comm.device.on_gpu import OnGpu
from mpipar.comm.mpi import MPI
from mpipar.comm.p2p import segments
from mpipar.comm.pending import Algorithm, Pending

PIECE_BYTES = 4 << 20

_NOT_WAITED_FOR = "an algorithm touches elements that it has not waited for: see `Buffer.coming`"


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

    __slots__ = ("__weakref__", "_down", "_host", "_reads", "_settled", "_up", "_wanted")

    def __init__(self, gpu: Gpu, array: Any, *, writable: bool = True, reads: bool = True):
        super().__init__(gpu, array, writable=writable)
        self._reads = reads
        # What has to come down, in this order: all, if no algorithm says what it will want.
        self._wanted: Iterable[tuple[int, int]] = segments(0, self.size, PIECE_BYTES // self.itemsize) if reads else ()
        self._settled = False
        self._host: _Copy | None = None  # once it has begun
        self._down: list[Piece] = []
        self._up = 0

    @property
    def is_in_host_memory(self) -> bool:
        return True

    def expect(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Pending]:
        if self._reads:
            self._wanted = ranges
        return self._begin()

    def coming(self, start: int, stop: int) -> Iterator[Pending]:
        if self._host is None:
            yield from self._begin()
        for piece in self._on_the_way(start, stop):
            yield piece.mark

    def message(self, start: int, stop: int) -> tuple[Any, MPI.Datatype]:
        self._take(start, stop)
        return super().message(start, stop)

    def combine(self, start: int, stop: int, op: Op, other: Buffer) -> None:
        self._take(start, stop)
        super().combine(start, stop, op, other)

    def scale(self, start: int, stop: int, factor: float) -> None:
        self._take(start, stop)
        super().scale(start, stop, factor)

    def replace(self, start: int, stop: int, source: Buffer, first: int) -> None:
        self._take(start, stop)
        super().replace(start, stop, source, first)

    def settle(self, start: int, stop: int) -> None:
        """Elements [start, stop) are final: they go up while the operation goes on."""
        if self._writable and stop > start:
            self._settled = True
            self._lift(start, stop)

    def convert(self, other: Buffer) -> Algorithm:
        yield from self.coming(0, self.size)
        yield from super().convert(other)

    def commit(self) -> None:
        """The caller's stream waits for what went up; if nothing was settled, all of it goes up now."""
        if not self._writable or self._host is None:  # or nobody has touched it
            return
        if not self._settled:
            self._take(0, self.size)
            for start, stop in segments(0, self.size, PIECE_BYTES // self.itemsize):
                self._lift(start, stop)
        self.caller.after(self._up)
        self.put_back()

    def _on_the_way(self, start: int, stop: int) -> list[Piece]:
        return [piece for piece in self._down if piece.start < stop and start < piece.stop]

    def _take(self, start: int, stop: int) -> None:
        """Elements [start, stop) are touched now: the algorithm has waited for them."""
        assert self._host is not None, _NOT_WAITED_FOR
        for piece in self._on_the_way(start, stop):
            assert piece.mark.through(), _NOT_WAITED_FOR
            self._down.remove(piece)

    def _begin(self) -> Iterator[Pending]:
        """Gets the memory, when the operation's turn has come: those that wait in a lane hold none."""
        self._up = self.gpu.stream("up")
        self.caller.before(self.gpu.stream("down"), self._up)
        address, size = yield from self.gpu.pinned.take(self.size * self.itemsize)
        self._host = _Copy(self.gpu, address, size)
        weakref.finalize(self, self._host.give_back).atexit = False
        self.lib, self.values = addable(self._host.view(self.dtype, self.size), self.dtype)
        for start, stop in self._wanted:
            self._bring(start, stop)

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

    def __init__(self, gpu: Gpu, address: int, size: int):
        self.address = address
        self._size = size
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
