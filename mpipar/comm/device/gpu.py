"""A GPU with what operations on it need and keep: events, pinned memory, and how they follow the caller's stream.

What is kept is given back by whoever drops it last, which may be a finalizer: in the middle of anything, on any thread.
So giving back is one append, and all else is done by who takes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

from mpipar.comm.device.runtime import DeviceError, Library, Runtime
from mpipar.comm.pending import Pending
from mpipar.errors import MessageError

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
        self._events: deque[int] = deque()  # that stand for nothing
        self._streams: dict[str, int] = {}
        self._lock = threading.RLock()

    def stream(self, purpose: str) -> int:
        """A stream of this process, one for each purpose."""
        with self._lock:
            if purpose not in self._streams:
                self._streams[purpose] = self.runtime.stream()
            return self._streams[purpose]

    def mark(self, stream: int) -> Mark:
        """What the stream has been given so far."""
        try:  # without looking first: another may take it between
            event = self._events.popleft()
        except IndexError:
            event = self.runtime.event()
        mark = Mark(self.runtime, event, self._events)
        self.runtime.record(event, stream)
        return mark

    def follow(self, stream: int, other: int) -> None:
        """What `stream` is given from now on is done after what `other` has been given so far. Nobody waits here."""
        self.mark(other).hold(stream)

    def through(self, stream: int) -> Iterator[Pending]:
        """For an algorithm: to wait until the stream has done what it was given."""
        yield self.mark(stream)


class Mark(Pending):
    """A place in what a stream is given. `Gpu.mark` makes it.

    Its event stands for another place when nobody holds this any more: streams that wait for it were told before, and
    keep to that.

    Args:
        runtime: Of the GPU.
        event: What is recorded there.
        returned: Where the event is to go.
    """

    __slots__ = ("_event", "_returned", "_runtime")

    moved_by_asking = False

    def __init__(self, runtime: Runtime, event: int, returned: deque[int]):
        self._runtime = runtime
        self._event = event
        self._returned = returned

    def __del__(self) -> None:
        self._returned.append(self._event)

    def through(self) -> bool:
        """Whether the stream has come there."""
        return self._runtime.reached(self._event)

    def stuck(self) -> str:
        return (
            f"GPU {self._runtime.name} has not done what this rank gave it: a kernel does not end, here or on "
            "a rank of this host that it waits for"
        )

    def hold(self, stream: int) -> None:
        """What another stream is given from now on is done after that."""
        self._runtime.wait(stream, self._event)


class Caller:
    """The stream on which an array was current when an operation was called with it.

    The operation follows what that stream had been given by then, and what the stream is given after the operation's
    end follows the operation. So the array is used like any other on that stream, and the host waits for neither.

    Args:
        gpu: Where the array is.
        library: Whose array it is.
    """

    __slots__ = ("_called", "_gpu", "stream")

    def __init__(self, gpu: Gpu, library: Library):
        self._gpu = gpu
        self.stream = gpu.runtime.current_stream(library)
        self._called: Mark | None = gpu.mark(self.stream)

    def before(self, *streams: int) -> None:
        """These streams follow the call. It is asked for once: what was called has begun."""
        assert self._called is not None, "the operation has begun before"
        for stream in streams:
            self._called.hold(stream)
        self._called = None

    def after(self, stream: int) -> None:
        """The caller's stream follows this one."""
        self._gpu.follow(self.stream, stream)


class Pinned:
    """Pinned memory, kept from operation to operation: to get it takes longer than to fill it.

    Args:
        runtime: Of the GPU.
    """

    def __init__(self, runtime: Runtime):
        self._runtime = runtime
        self._returned: deque[_Block] = deque()
        self._free: dict[int, deque[_Block]] = {}  # by size
        self._free_bytes = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Generator[Pending, None, tuple[int, int]]:
        """For an algorithm: to wait for (address, size) of memory that nothing reads or writes any more.

        What is copied there follows the streams of those who had it before, and so may wait for other ranks.
        """
        size = _rounded_up(num_bytes)
        with self._lock:
            self._sort_in()
            blocks = self._free.get(size)
            if not blocks:
                return self._allocate(size), size
            self._free_bytes -= size
            block = blocks.popleft()  # the one that has been free for longest
        yield from block.marks
        return block.address, size

    def give(self, address: int, size: int, marks: Sequence[Mark]) -> None:
        """Takes it back.

        Args:
            address: Of the memory.
            size: As it was taken.
            marks: Behind them the device has done with it. They are waited for before the memory is used again.
        """
        self._returned.append(_Block(address, size, marks))

    def _allocate(self, size: int) -> int:
        try:
            return self._runtime.pinned(size)
        except DeviceError as error:
            raise MessageError(
                f"{size:,} bytes of the host's memory cannot be pinned, through which an array on GPU "
                f"{self._runtime.name} is to go: {error}. Give smaller arrays, or the job more memory"
            ) from error

    def _sort_in(self) -> None:
        """What was given back is kept for the next operation, or freed, if that is enough and the device is done."""
        while self._returned:
            block = self._returned.popleft()
            self._free.setdefault(block.size, deque()).append(block)
            self._free_bytes += block.size
        for blocks in self._free.values():
            while blocks and self._free_bytes > _MOST_PINNED_BYTES and all(mark.through() for mark in blocks[0].marks):
                block = blocks.popleft()
                self._free_bytes -= block.size
                self._runtime.free_pinned(block.address)


def _rounded_up(num_bytes: int) -> int:
    """One of few sizes, so that memory is found again, and by an eighth at most too large."""
    step = max(_LEAST_PINNED_BYTES, (1 << max(0, num_bytes - 1).bit_length()) >> 4)
    return max(1, -(-num_bytes // step)) * step


class _Block(NamedTuple):
    """Memory that was given back."""

    address: int
    size: int
    marks: Sequence[Mark]
