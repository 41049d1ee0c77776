"""An array on a GPU, for an MPI that takes pointers to its memory: MPIPAR_CUDA=mpi.

The ring over these views is the ring of the CPU. MPI knows nothing of streams, so the algorithm waits before it hands
memory over: for one event, of the stream on which the operation works, and not for the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from mpipar.comm.buffers import Buffer, Op, accumulate
from mpipar.comm.device.cuda import as_message
from mpipar.comm.device.gpu import Gpu, Mark
from mpipar.comm.device.on_gpu import OnGpu
from mpipar.comm.mpi import MPI
from mpipar.comm.pending import Algorithm, Pending


class View(OnGpu):
    """The memory of one array itself, for one operation."""

    __slots__ = ("_began", "_given", "_stream")

    def __init__(self, gpu: Gpu, array: Any, *, writable: bool = True):
        super().__init__(gpu, array, writable=writable)
        self.lib = torch
        with gpu.runtime.current():
            self.values = self._flat if isinstance(self._flat, torch.Tensor) else from_dlpack(self._flat)
        self._stream = gpu.stream("views")
        self._given: Mark | None = None  # behind what the stream works on, if it has to be waited for
        self._began = False

    @property
    def is_in_host_memory(self) -> bool:
        return False

    def fresh(self, size: int) -> Buffer:
        with self.gpu.runtime.on(self._stream):  # behind which torch may use the memory again
            return View(self.gpu, torch.empty(size, dtype=self.values.dtype, device=self.values.device))

    def coming(self, start: int, stop: int) -> list[Pending]:
        """All that this operation has given the device, and what the caller had."""
        self._begin()
        return [self._given] if self._given is not None else []

    def message(self, start: int, stop: int) -> tuple[Any, MPI.Datatype]:
        assert self._began and (self._given is None or self._given.through()), "see `Buffer.coming`"
        self._given = None
        if self._bytes is None:
            with self.gpu.runtime.current():
                self._bytes = as_message(self.values.view(torch.uint8)) if self.size else np.empty(0, np.uint8)
        return self._bytes[start * self.itemsize : stop * self.itemsize], MPI.BYTE

    def combine(self, start: int, stop: int, op: Op, other: Buffer) -> None:
        with self.gpu.runtime.on(self._stream):
            accumulate(self.lib, op, self.values[start:stop], other.values[: stop - start])
        self._gave()
        if isinstance(other, View):
            other._gave()  # MPI may write there again when it was read

    def scale(self, start: int, stop: int, factor: float) -> None:
        with self.gpu.runtime.on(self._stream):
            super().scale(start, stop, factor)
        self._gave()

    def replace(self, start: int, stop: int, source: Buffer, first: int) -> None:
        self._begin()
        with self.gpu.runtime.on(self._stream):
            super().replace(start, stop, source, first)
        self._gave()

    def convert(self, other: Buffer) -> Algorithm:
        yield from other.coming(0, other.size)
        self._begin()
        with self.gpu.runtime.on(self._stream):
            self.values.copy_(other.values)
        self._gave()
        self.commit()

    def commit(self) -> None:
        """The caller's stream follows."""
        if self._writable:
            self.caller.after(self._stream)
            self.put_back()

    def _begin(self) -> None:
        if not self._began:
            self._began = True
            self.caller.before(self._stream)
            self._given = self.gpu.mark(self._stream)

    def _gave(self) -> None:
        """The stream has something to do."""
        self._given = self.gpu.mark(self._stream)
