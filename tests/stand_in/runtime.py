"""The stand-in for CUDA: `mpipar.comm.device.runtime.Runtime`, over memory of the host that processes share.

Streams are as late as they can be: what they are given is done when somebody waits for an event behind it, and not
before. So whoever reads without waiting reads what was there before. And each use of memory is noted on the board,
which sees missing waits that happened to do no harm.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpipar.comm import segment
from mpipar.comm.device.runtime import Addition, DeviceError, Rounding
from mpipar.parallel.ledger import GpuLedger
from tests.stand_in import arithmetic
from tests.stand_in.board import PROCESSES, STREAMS, Board, Clock, Misuse, Span

_DEFAULT_STREAM = 0
_PATIENCE_S = 20.0
_BASE_EVENT = 1 << 32  # so that an event is not taken for a stream


class StandIn:
    """One GPU that all processes of the host share.

    Args:
        board: What the processes know of each other.
    """

    name = "0000:00:00.0"

    def __init__(self, board: Board):
        self.board = board
        self.failure: BaseException | None = None
        self.waits_on_host = 0  # how often this process's host has waited for the device
        self.waits_for_others = 0  # how often its streams were told to wait for events of other processes
        self.known: Clock = np.zeros((PROCESSES, STREAMS), np.int64)  # by this process's host to be done
        self._me = board.process
        self._counts = [0] * STREAMS
        self._clocks: list[Clock] = [np.zeros((PROCESSES, STREAMS), np.int64) for _ in range(STREAMS)]
        self._queues: list[deque[Callable[[], bool]]] = [deque() for _ in range(STREAMS)]
        self._num_streams = 1
        self._maps: dict[int, tuple[mmap.mmap, int, Span]] = {}  # by address: memory, descriptor, whole span
        self._exported: dict[int, bytes] = {}
        self._pinned: dict[int, Any] = {}
        self._num_allocations = 0
        self._under_way: dict[tuple[int, int], int] = {}  # records that are not done: event, number -> stream
        self._wanted: set[tuple[int, int]] = set()  # of these, by this process
        self._lock = threading.RLock()
        self._ended = False
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    # Streams and events

    def current_stream(self, array: Any) -> int:
        return _DEFAULT_STREAM

    def stream(self) -> int:
        assert self._num_streams < STREAMS
        self._num_streams += 1
        return self._num_streams - 1

    def event(self, *, shared: bool = False) -> int:
        events = self.board.own["events"]
        free = np.flatnonzero(events["live"] == 0)
        assert len(free), "the stand-in has no more events"
        events[free[0]] = np.zeros((), events.dtype)
        events[free[0]]["live"] = 2 if shared else 1
        return _BASE_EVENT + self._me * 1000 + int(free[0])

    def destroy_event(self, event: int) -> None:
        process, index = self._find(event)
        if process == self._me:
            self.board.own["events"][index]["live"] = 0

    def record(self, event: int, stream: int) -> None:
        process, index = self._find(event)
        if process != self._me:
            raise Misuse("an event of another process is recorded")
        with self._lock:
            entry = self.board.own["events"][index]
            # What the host has seen done is done before what it gives the stream now.
            np.maximum(self._clocks[stream], self.known, out=self._clocks[stream])
            entry["clock"] = self._clocks[stream].ravel()
            number = int(entry["recorded"]) + 1

            def reach() -> bool:
                del self._under_way[index, number]
                self._wanted.discard((index, number))
                entry["done"] = max(int(entry["done"]), number)
                return True

            self._under_way[index, number] = stream
            self._queues[stream].append(reach)
            entry["recorded"] = number

    def wait(self, stream: int, event: int) -> None:
        process, index = self._find(event)
        entry = self.board.parts[process]["events"][index]
        if entry["live"] == 1 and process != self._me:
            raise Misuse("an event of another process that is not shared")
        self.waits_for_others += process != self._me
        with self._lock:
            number = int(entry["recorded"])
            if number == 0:
                raise Misuse("a wait for an event that was never recorded is none")
            np.maximum(self._clocks[stream], entry["clock"].reshape(PROCESSES, STREAMS), out=self._clocks[stream])
            self._queues[stream].append(lambda: self._is_done(process, index, number))

    def reached(self, event: int) -> bool:
        process, index = self._find(event)
        entry = self.board.parts[process]["events"][index]
        number = int(entry["recorded"])
        if not self._is_done(process, index, number):
            return False
        np.maximum(self.known, entry["clock"].reshape(PROCESSES, STREAMS), out=self.known)
        return True

    def synchronise(self, event: int) -> None:
        self.waits_on_host += 1
        give_up = time.monotonic() + _PATIENCE_S
        while not self.reached(event):
            self.check()
            if time.monotonic() > give_up:
                raise Misuse(f"process {self._me} waits for an event that is never reached")
            time.sleep(0.0001)
        self.check()

    # Memory

    def allocate(self, num_bytes: int) -> int:
        try:
            handle = segment._create(num_bytes)
        except OSError as error:
            raise DeviceError(f"cudaErrorMemoryAllocation: {error.strerror}") from error
        memory = mmap.mmap(handle.descriptor, num_bytes)
        memory[:] = b"\xa5" * num_bytes
        number, self._num_allocations = self._num_allocations, self._num_allocations + 1
        entry = self.board.own["allocations"][number]
        entry["live"], entry["num_bytes"] = 1, num_bytes
        address = _address(memory)
        self._exported[address] = pickle.dumps((self._me, number, num_bytes, tuple(handle)))
        self._maps[address] = memory, handle.descriptor, Span(self._me, number, 0, num_bytes)
        return address

    def free(self, address: int) -> None:
        if address not in self._exported:
            raise Misuse("freed twice, or what was never allocated")
        memory, descriptor, span = self._maps.pop(address)
        entry = self.board.own["allocations"][span.number]
        if entry["opened"].any():
            raise Misuse(f"freed while processes {np.flatnonzero(entry['opened']).tolist()} have it open")
        self._drain()
        entry["live"] = 0
        del self._exported[address], memory
        os.close(descriptor)

    def pinned(self, num_bytes: int) -> int:
        memory = (ctypes.c_uint8 * num_bytes)()
        ctypes.memset(memory, 0xA5, num_bytes)
        address = ctypes.addressof(memory)
        self._pinned[address] = memory
        return address

    def free_pinned(self, address: int) -> None:
        self._drain()
        del self._pinned[address]

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        reads = [(source, num_bytes)] if self._span(source, num_bytes) else []
        writes = [(target, num_bytes)] if self._span(target, num_bytes) else []
        for address in (source, target):
            assert self._span(address, num_bytes) or self._is_pinned(address, num_bytes), "unknown memory"
        self._give(stream, lambda: ctypes.memmove(target, source, num_bytes), reads=reads, writes=writes)

    def copy_elements(self, target: Any, source: Any, stream: int) -> None:
        def run() -> None:
            target.copy_(source.view(target.shape))

        self._give(stream, run, reads=[(source.data_ptr(), source.numel() * source.element_size())])

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        self._give(stream, lambda: ctypes.memset(address, 0, num_bytes), writes=[(address, num_bytes)])

    def tensor(self, address: int, num_bytes: int, owner: object) -> Tensor:
        words: Any = (ctypes.c_uint8 * num_bytes).from_address(address)
        words.owner = owner
        return torch.from_numpy(np.ctypeslib.as_array(words))

    def on(self, stream: int) -> AbstractContextManager[object]:
        return nullcontext()

    # Between processes

    def export_memory(self, address: int) -> bytes:
        return self._exported[address]

    def open_memory(self, handle: bytes) -> int:
        owner, number, num_bytes, where = pickle.loads(handle)
        if owner == self._me:
            raise Misuse("a process opens its own memory")
        entry = self.board.parts[owner]["allocations"][number]
        if not entry["live"]:
            raise Misuse("opened after it was freed")
        opened = segment._open(segment.Handle(*where), num_bytes)
        entry["opened"][self._me] += 1
        address = _address(opened.memory)
        self._maps[address] = opened.memory, opened.descriptor, Span(owner, number, 0, num_bytes)
        return address

    def close_memory(self, address: int) -> None:
        if address not in self._maps or address in self._exported:
            raise Misuse("closed twice, or what was never opened")
        _, descriptor, span = self._maps.pop(address)
        if any(self._queues):
            self._drain()
        self.board.parts[span.owner]["allocations"][span.number]["opened"][self._me] -= 1
        os.close(descriptor)

    def export_event(self, event: int) -> bytes:
        process, index = self._find(event)
        if process != self._me or self.board.own["events"][index]["live"] != 2:
            raise Misuse("an event that is not shared is exported")
        return event.to_bytes(8, "little")

    def open_event(self, handle: bytes) -> int:
        return int.from_bytes(handle, "little")

    def unreachable(self, name: str) -> str | None:
        return None

    # Kernels

    def add(self, addition: Addition, stream: int) -> None:
        itemsize = torch.empty(0, dtype=getattr(torch, addition.dtype)).element_size()
        into = torch.empty(0, dtype=getattr(torch, addition.into)).element_size()
        targets = [addition.out] if addition.out is not None else [row + addition.target for row in addition.rows]
        self._give(
            stream,
            lambda: arithmetic.add(addition),
            reads=[
                *((row + addition.source, addition.size * itemsize) for row in addition.rows),
                (addition.table, 8 * len(addition.rows)),
            ],
            writes=[(target, addition.size * into) for target in targets],
        )

    def round_and_add(self, rounding: Rounding, stream: int) -> None:
        itemsize = torch.empty(0, dtype=getattr(torch, rounding.dtype)).element_size()
        self._give(
            stream,
            lambda: arithmetic.round_and_add(rounding),
            reads=[(rounding.x, rounding.size * itemsize)],
            writes=[(rounding.total, 8 * rounding.size), (rounding.largest, 8)],
        )

    # For tests

    @property
    def num_events(self) -> int:
        """Of this process, that were not destroyed."""
        return int((self.board.own["events"]["live"] != 0).sum())

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
        return isinstance(x, Tensor) and x.numel() > 0 and self._span(x.data_ptr(), 1) is not None

    def put(self, x: Tensor, values: Tensor) -> None:
        """On the caller's stream, some time: x becomes the values."""
        values = values.to(x.dtype, copy=True)
        num_bytes = x.numel() * x.element_size()
        self._give(_DEFAULT_STREAM, lambda: x.copy_(values), writes=[(x.data_ptr(), num_bytes)] if num_bytes else [])

    def get(self, x: Tensor) -> Tensor:
        """What is in x when the caller's stream has done what it was given."""
        found: list[Tensor] = []
        num_bytes = x.numel() * x.element_size()
        self._give(
            _DEFAULT_STREAM, lambda: found.append(x.clone()), reads=[(x.data_ptr(), num_bytes)] if num_bytes else []
        )
        self.finish()
        return found[0]

    def is_busy(self, stream: int) -> bool:
        """Whether a stream has something left to do."""
        with self._lock:
            return bool(self._queues[stream])

    def finish(self) -> None:
        """Waits for the caller's stream."""
        event = self.event()
        self.record(event, _DEFAULT_STREAM)
        self.synchronise(event)
        self.destroy_event(event)

    def die(self) -> None:
        """The process is gone, and with it all that it had given to the device."""
        self._drain()
        self.board.own["num_accesses"] = 0
        self.board.own["events"]["live"] = 0  # a wait for one of them is a misuse
        for part in self.board.parts:
            part["allocations"]["opened"][:, self._me] = 0

    def check(self) -> None:
        """Raises what went wrong on the device."""
        if self.failure is not None:
            raise self.failure

    def end(self) -> None:
        """Does all that was given, and ends."""
        self._drain()
        self._ended = True
        self._thread.join()
        self.check()

    # Inside

    def _give(
        self,
        stream: int,
        work: Callable[[], object],
        reads: list[tuple[int, int]] | None = None,
        writes: list[tuple[int, int]] | None = None,
    ) -> None:
        with self._lock:
            self._counts[stream] += 1
            clock = self._clocks[stream]
            np.maximum(clock, self.known, out=clock)
            clock[self._me, stream] = self._counts[stream]
            for spans, is_writing in ((reads or [], False), (writes or [], True)):
                for address, num_bytes in spans:
                    span = self._span(address, num_bytes)
                    if span is None:
                        raise Misuse("a kernel uses memory that is not the device's, or that is closed")
                    self.board.access(
                        span, writes=is_writing, stream=stream, count=self._counts[stream], clock=clock.copy()
                    )

            def run() -> bool:
                work()
                return True

            self._queues[stream].append(run)

    def _span(self, address: int, num_bytes: int) -> Span | None:
        for start, (_, _, whole) in self._maps.items():
            offset = address - start
            if offset >= 0 and offset + num_bytes <= whole.stop:
                return Span(whole.owner, whole.number, offset, offset + num_bytes)
        return None

    def _is_pinned(self, address: int, num_bytes: int) -> bool:
        return any(
            start <= address and address + num_bytes <= start + len(memory) for start, memory in self._pinned.items()
        )

    def _find(self, event: int) -> tuple[int, int]:
        process, index = divmod(event - _BASE_EVENT, 1000)
        if event < _BASE_EVENT or not self.board.parts[process]["events"][index]["live"]:
            raise Misuse("an event is used after it was destroyed")
        return process, index

    def _is_done(self, process: int, index: int, number: int) -> bool:
        if process == self._me:  # where an event may have been recorded again meanwhile, on another stream
            if (index, number) in self._under_way:
                self._wanted.add((index, number))
                return False
            return True
        entry = self.board.parts[process]["events"][index]
        entry["wanted"] = max(int(entry["wanted"]), number)
        return int(entry["done"]) >= number

    def _answer(self) -> None:
        """The device: does what stands before the events that somebody wants."""
        try:
            while not self._ended:
                if not self._advance():
                    time.sleep(0.0002)
        except BaseException as error:
            self.failure = error

    def _advance(self) -> bool:
        events = self.board.own["events"]
        moved = False
        with self._lock:
            wanted = self._wanted | {record for record in self._under_way if events["wanted"][record[0]] >= record[1]}
            for record in wanted:
                stream = self._under_way.get(record)
                while stream is not None and record in self._under_way and self._queues[stream][0]():
                    self._queues[stream].popleft()
                    moved = True
        return moved

    def _drain(self) -> None:
        give_up = time.monotonic() + _PATIENCE_S
        while any(self._queues):
            with self._lock:
                for queue in self._queues:
                    while queue and queue[0]():
                        queue.popleft()
            if time.monotonic() > give_up:
                raise Misuse("the device does not come to an end")
            time.sleep(0.0001)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_uint8.from_buffer(memory))
