"""A GPU with what operations on it need and keep: events, pinned memory, and how they follow the caller's stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mpipar.comm.device.runtime import Runtime
from mpipar.comm.pending import Pending

_MOST_PINNED_BYTES = 1 << 30  # that are kept for the next operation
_LEAST_PINNED_BYTES = 64 << 10


class Gpu:
    """One GPU in this process.

    Args:
        runtime: Its calls.

    Attributes:
        runtime: The same.
        pinned: Memory of the host for copies.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.pinned = Pinned(runtime)
        self._events: list[int] = []
        self._streams: dict[str, int] = {}

    def stream(self, purpose: str) -> int:
        """A stream of this process, one for each purpose."""
        if purpose not in self._streams:
            self._streams[purpose] = self.runtime.stream()
        return self._streams[purpose]

    def mark(self, stream: int) -> int:
        """An event for what the stream has been given so far. `forget` takes it back."""
        try:  # without looking first: a finalizer may come between
            event = self._events.pop()
        except IndexError:
            event = self.runtime.event()
        self.runtime.record(event, stream)
        return event

    def forget(self, event: int) -> None:
        """The event can stand for something else: what waits for it was told before, and keeps to that."""
        self._events.append(event)

    def follow(self, stream: int, other: int) -> None:
        """What `stream` is given from now on is done after what `other` has been given so far. Nobody waits here."""
        event = self.mark(other)
        self.runtime.wait(stream, event)
        self.forget(event)

    def through(self, stream: int) -> Iterator[Pending]:
        """For an algorithm: to wait until the stream has done what it was given."""
        event = self.mark(stream)
        try:
            yield Reached(self.runtime, event)
        finally:
            self.forget(event)

    def finish(self, stream: int) -> None:
        """Waits here until the stream has done what it was given."""
        event = self.mark(stream)
        self.runtime.synchronise(event)
        self.forget(event)


class Caller:
    """The stream on which an array was current when an operation was called with it.

    The operation follows what that stream had been given by then, and what the stream is given after the operation's
    end follows the operation. So the array is used like any other on that stream, and the host waits for neither.

    Args:
        gpu: Where the array is.
        array: The caller's.
    """

    __slots__ = ("_called", "_gpu", "stream")

    def __init__(self, gpu: Gpu, array: Any):
        self._gpu = gpu
        self.stream = gpu.runtime.current_stream(array)
        self._called = gpu.mark(self.stream)

    def before(self, *streams: int) -> None:
        """These streams follow the call. It is asked for once: what was called has begun."""
        assert self._called, "the operation has begun before"
        for stream in streams:
            self._gpu.runtime.wait(stream, self._called)
        self._gpu.forget(self._called)
        self._called = 0

    def after(self, stream: int) -> None:
        """The caller's stream follows this one."""
        self._gpu.follow(self.stream, stream)


class Reached(Pending):
    """An event that is on its way, for a host that has to know."""

    __slots__ = ("_event", "_runtime")

    def __init__(self, runtime: Runtime, event: int):
        self._runtime = runtime
        self._event = event

    def through(self) -> bool:
        return self._runtime.reached(self._event)


class Pinned:
    """Pinned memory, kept from operation to operation: to get it takes longer than to fill it.

    Args:
        runtime: Of the GPU.
    """

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._free: dict[int, list[tuple[int, Callable[[], None]]]] = {}
        self._free_bytes = 0

    def take(self, num_bytes: int) -> tuple[int, int]:
        """(address, size) of memory that nothing reads or writes any more."""
        size = max(_LEAST_PINNED_BYTES, 1 << (num_bytes - 1).bit_length()) if num_bytes else _LEAST_PINNED_BYTES
        blocks = self._free.get(size)
        if not blocks:
            return self._runtime.pinned(size), size
        address, wait = blocks.pop(0)  # the one that has been free for longest
        self._free_bytes -= size
        wait()
        return address, size

    def give(self, address: int, size: int, wait: Callable[[], None]) -> None:
        """Takes it back.

        Args:
            address: Of the memory.
            size: As it was taken.
            wait: Returns when the device has done with it. It is called before the memory is used again.
        """
        if self._free_bytes + size > _MOST_PINNED_BYTES:
            wait()
            self._runtime.free_pinned(address)
            return
        self._free.setdefault(size, []).append((address, wait))
        self._free_bytes += size
