"""The stand-in for CUDA: `mpipar.comm.device.runtime.Runtime`, over memory of the host that processes share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpipar.comm.device.runtime import Addition, Library, Rounding
from mpipar.parallel.ledger import GpuLedger
from tests.stand_in import arithmetic, streams
from tests.stand_in.board import Board, Clock, Misuse, Span
from tests.stand_in.memory import DeviceMemory, PinnedMemory
from tests.stand_in.streams import Streams
from tests.stand_in.torch_ops import OnStream


class StandIn:
    """One GPU that all processes of the host share.

    Args:
        board: What the processes know of each other.

    Attributes:
        asked: How often this process's host has looked whether the device is somewhere.
        pinned_memory: Of this process.
    """

    name = "0000:00:00.0"

    def __init__(self, board: Board):
        self.board = board
        self.asked = 0
        self.pinned_memory = PinnedMemory()
        self._memory = DeviceMemory(board)
        self._streams = Streams(board)

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    # Streams and events

    def current_stream(self, library: Library) -> int:
        return streams.DEFAULT

    def stream(self) -> int:
        return self._streams.make()

    def event(self, *, shared: bool = False) -> int:
        return self._streams.event(shared=shared)

    def destroy_event(self, event: int) -> None:
        self._streams.destroy_event(event)

    def record(self, event: int, stream: int) -> None:
        self._streams.record(event, stream)

    def wait(self, stream: int, event: int) -> None:
        self._streams.wait(stream, event)

    def reached(self, event: int) -> bool:
        self.asked += 1
        return self._streams.reached(event)

    # Memory

    def allocate(self, num_bytes: int) -> int:
        return self._memory.allocate(num_bytes)

    def free(self, address: int) -> None:
        self._streams.drain()
        self._memory.free(address)

    def pinned(self, num_bytes: int) -> int:
        return self.pinned_memory.allocate(num_bytes)

    def free_pinned(self, address: int) -> None:
        self._streams.drain()
        self.pinned_memory.free(address)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        reads, writes = (
            [] if self.pinned_memory.holds(address, num_bytes) else [self._memory.span(address, num_bytes)]
            for address in (source, target)
        )
        self._streams.give(stream, lambda: ctypes.memmove(target, source, num_bytes), reads, writes)

    def copy_elements(self, target: Any, source: Any, stream: int) -> None:
        reads, writes = self._spans([source]), self._spans([target] if target.is_contiguous() else [])
        self._streams.give(stream, lambda: target.copy_(source.view(target.shape)), reads, writes)

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        writes = [self._memory.span(address, num_bytes)]
        self._streams.give(stream, lambda: ctypes.memset(address, 0, num_bytes), writes=writes)

    def tensor(self, address: int, num_bytes: int, owner: object) -> Tensor:
        words: Any = (ctypes.c_uint8 * num_bytes).from_address(address)
        words.owner = owner
        return torch.from_numpy(np.ctypeslib.as_array(words))

    def on(self, stream: int) -> AbstractContextManager[object]:
        def give(work: Callable[[], object], *, reads: list[Tensor], writes: list[Tensor]) -> None:
            self._streams.give(stream, work, self._spans(reads), self._spans(writes))

        mode: AbstractContextManager[object] = OnStream(give, self.array)
        return mode

    # Between processes

    def export_memory(self, address: int) -> bytes:
        return self._memory.export(address)

    def open_memory(self, handle: bytes) -> int:
        return self._memory.open(handle)

    def close_memory(self, address: int) -> None:
        self._streams.drain()
        self._memory.close(address)

    def export_event(self, event: int) -> bytes:
        if not self._streams.is_own_and_shared(event):
            raise Misuse("an event that is not shared is exported")
        return event.to_bytes(8, "little")

    def open_event(self, handle: bytes) -> int:
        return int.from_bytes(handle, "little")

    def unreachable(self, name: str) -> str | None:
        return None

    # Kernels

    def add(self, addition: Addition, stream: int) -> None:
        span, num_bytes = self._memory.span, addition.size * getattr(torch, addition.dtype).itemsize
        into_bytes = addition.size * getattr(torch, addition.into).itemsize
        targets = [addition.out] if addition.out is not None else [row + addition.target for row in addition.rows]
        reads = [span(row + addition.source, num_bytes) for row in addition.rows]
        reads.append(span(addition.table, 8 * len(addition.rows)))
        writes = [span(target, into_bytes) for target in targets]
        self._streams.give(stream, lambda: arithmetic.add(addition), reads, writes)

    def round_and_add(self, rounding: Rounding, stream: int) -> None:
        span, itemsize = self._memory.span, getattr(torch, rounding.dtype).itemsize
        reads = [span(rounding.x, rounding.size * itemsize)]
        writes = [span(rounding.total, 8 * rounding.size), span(rounding.largest, 8)]
        self._streams.give(stream, lambda: arithmetic.round_and_add(rounding), reads, writes)

    # For tests

    @property
    def known(self) -> Clock:
        """What this process's host has seen to be done."""
        return self._streams.known

    @property
    def waits_for_others(self) -> int:
        """How often streams were told to wait for events of other processes."""
        return self._streams.waits_for_others

    @property
    def num_events(self) -> int:
        """Of this process, that were not destroyed."""
        return self._streams.num_events

    def array(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] on the device, of no defined content."""
        num_bytes = max(1, size * dtype.itemsize)
        return self.tensor(self.allocate(num_bytes), num_bytes, None)[: size * dtype.itemsize].view(dtype)

    def magnitudes(self, ledger: GpuLedger) -> None:
        """Lets a ledger keep its notes on the device."""
        notes = self.array(ledger._magnitudes.numel(), torch.float64).view(ledger._magnitudes.shape)
        notes.zero_()
        ledger._magnitudes = notes

    def holds(self, x: object) -> bool:
        """Whether a tensor is on the device."""
        return isinstance(x, Tensor) and x.numel() > 0 and self._memory.holds(x.data_ptr(), 1)

    def put(self, x: Tensor, values: Tensor) -> None:
        """On the caller's stream, some time: x becomes the values."""
        values = values.to(x.dtype, copy=True)
        self._streams.give(streams.DEFAULT, lambda: x.copy_(values), writes=self._spans([x]))

    def later(self, work: Callable[[], object], *, reads: list[Tensor]) -> None:
        """On the caller's stream, some time: whatever it is."""
        self._streams.give(streams.DEFAULT, work, self._spans(reads))

    def get(self, x: Tensor) -> Tensor:
        """What is in x when the caller's stream has done what it was given."""
        found: list[Tensor] = []
        self._streams.give(streams.DEFAULT, lambda: found.append(x.clone()), self._spans([x]))
        self.finish()
        return found[0]

    def is_busy(self, stream: int) -> bool:
        """Whether a stream has something left to do."""
        return self._streams.is_busy(stream)

    def finish(self) -> None:
        """Waits for the caller's stream."""
        self._streams.finish(streams.DEFAULT)

    def die(self) -> None:
        """The process is gone, and with it all that it had given to the device."""
        self._streams.drain()
        self.board.own["num_accesses"] = 0
        self.board.own["events"]["live"] = 0  # a wait for one of them is a misuse
        for part in self.board.parts:
            part["allocations"]["opened"][:, self.board.process] = 0

    def end(self) -> None:
        """Does all that was given, and ends."""
        self._streams.end()

    def _spans(self, tensors: list[Tensor]) -> list[Span]:
        """Of contiguous tensors; what is empty, or a number, has none."""
        sizes = [(x.data_ptr(), x.numel() * x.element_size()) for x in tensors]
        return [self._memory.span(address, num_bytes) for address, num_bytes in sizes if num_bytes]
