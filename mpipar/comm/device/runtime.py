"""The calls of CUDA that this package makes, and no others.

`cuda.Cuda` makes them on a GPU. The protocol is here so that the bookkeeping around them (who waits for what, who frees
what) can run without one, on a stand-in that notices what a GPU would let pass until it goes wrong.

Streams, events and addresses are numbers, as in CUDA. A stream does what is given to it in order, whenever it gets to
it. No call here waits for a stream: whoever has to asks, again and again, whether an event is reached, and can give up.
An event that is recorded stands for all that its stream was given before.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from mpipar.comm.buffers import Op

Library = Literal["torch", "cupy"]


@dataclass(frozen=True, slots=True)
class Addition:
    """The sum (mean, maximum) of one place in several segments, to be made by one kernel.

    Rows are added in their order, 16-bit floats in float32, everything else in its own dtype.

    Args:
        rows: The addresses of the segments.
        table: Where the same addresses lie in the memory of the device.
        source: Of the first element in each row, in bytes from its beginning.
        target: Of the first element of the result in each row.
        out: An address that gets the result, in place of the rows; None to give it to all rows.
        size: Elements.
        dtype: Of the elements.
        into: The dtype of the result: another one for a sum of float64 only.
        op: The operation. A mean divides by the number of rows.
    """

    rows: tuple[int, ...]
    table: int
    source: int
    target: int
    out: int | None
    size: int
    dtype: str
    into: str
    op: Op


@dataclass(frozen=True, slots=True)
class Rounding:
    """A contribution that is rounded onto a grid and added, by one kernel: `exact.add_rounded`.

    Args:
        total: The address of [size] float64.
        x: The address of the contribution, [size] of a floating-point dtype.
        size: Elements.
        dtype: Of the contribution.
        anchor: Of the grid.
        first: Whether the total becomes the contribution, and may hold anything before.
        largest: The address of a float64, not negative, which becomes the larger one of itself and the largest |x|; NaN
            is larger than all.
    """

    total: int
    x: int
    size: int
    dtype: str
    anchor: float
    first: bool
    largest: int


class Runtime(Protocol):
    """One GPU, as seen by one process."""

    @property
    def name(self) -> str:
        """Which GPU of the host it is, by a name that all processes have for it."""

    def current(self) -> AbstractContextManager[object]:
        """Where this is entered the GPU is the current one of the thread, for libraries that ask which one that is.

        The calls below see to it themselves.
        """

    # Streams and events

    def current_stream(self, library: Library) -> int:
        """The stream on which a library now works, in this thread."""

    def stream(self) -> int:
        """A new one, that waits for no other of itself."""

    def event(self, *, shared: bool = False) -> int:
        """A new one. One that is shared can be opened by other processes, and is waited for on devices only."""

    def destroy_event(self, event: int) -> None:
        """Of this process, or of another."""

    def record(self, event: int, stream: int) -> None:
        """The event now stands for what the stream has been given so far."""

    def wait(self, stream: int, event: int) -> None:
        """What the stream is given from now on is done after what the event stands for now."""

    def reached(self, event: int) -> bool:
        """Whether all that the event stands for is done."""

    # Memory

    def allocate(self, num_bytes: int) -> int:
        """An allocation of its own, in the memory of the device."""

    def free(self, address: int) -> None:
        """Nobody may have it open any more."""

    def pinned(self, num_bytes: int) -> int:
        """Memory of the host that the device reads and writes by itself."""

    def free_pinned(self, address: int) -> None:
        """No copy from it or to it may be under way."""

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Between any two addresses, of the device or in pinned memory."""

    def copy_elements(self, target: Any, source: Any, stream: int) -> None:
        """target[...] = source, two arrays of one library and size, of any layout and dtype."""

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        """Fills memory of the device."""

    def tensor(self, address: int, num_bytes: int, owner: object) -> Tensor:
        """[num_bytes] uint8 over memory of the device. The owner lives as long as the tensor or a view of it."""

    def on(self, stream: int) -> AbstractContextManager[object]:
        """What torch does where this is entered it gives to the stream."""

    # Between processes

    def export_memory(self, address: int) -> bytes:
        """A handle of a whole allocation."""

    def open_memory(self, handle: bytes) -> int:
        """The address here of an allocation of another process."""

    def close_memory(self, address: int) -> None:
        """Of what was opened. No kernel may be using it."""

    def export_event(self, event: int) -> bytes:
        """A handle of an event that is shared."""

    def open_event(self, handle: bytes) -> int:
        """An event of another process."""

    def unreachable(self, name: str) -> str | None:
        """Why memory of the GPU of this name cannot be opened on this one."""

    # Kernels

    def add(self, addition: Addition, stream: int) -> None:
        """Gives it to the stream."""

    def round_and_add(self, rounding: Rounding, stream: int) -> None:
        """Gives it to the stream."""


class DeviceError(Exception):
    """What CUDA refused, or what is missing to ask it."""
