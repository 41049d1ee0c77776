"""From an array to messages: dtype and layout.

Messages are bytes and nothing else: MPI has no portable bfloat16 or float16, its 32-bit counts end at 2 GiB, and all
arithmetic is ours, but for what goes through MPI's own all-reduce. A `Buffer` is a flat view of an array from which
both sides are cut by element: `message` for MPI, `values` for arithmetic.

    array                     values                bytes
    numpy                     numpy                 numpy, uint8
    torch on the CPU          numpy                 numpy, uint8
      float16, bfloat16       torch (numpy has no bfloat16 and adds float16 one by one)

Arrays on a GPU are buffers of `device`, with the same methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from mpipar.comm.mpi import MPI
from mpipar.comm.pending import Algorithm, Pending
from mpipar.errors import MessageError

Op = Literal["sum", "mean", "max"]

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
MOVABLE = (*_FLOATS, *_INTEGERS, "bool")
# Those of both libraries; looking them up is faster than asking them for their names.
_NAMES: dict[object, str] = {
    **{getattr(torch, name): name for name in MOVABLE},
    **{np.dtype(name): name for name in MOVABLE if name != "bfloat16"},
}
_ITEMSIZES = {dtype: 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize for dtype in MOVABLE}


class Buffer:
    """A flat, contiguous, typed view of one array.

    Args:
        array: A torch tensor on the CPU or numpy array of any shape. One that is not contiguous, or a numpy array
            whose elements are not aligned, is copied here and copied back by `commit`.
        writable: Whether the operation writes into the array.

    Raises:
        MessageError: The dtype, layout or kind of array cannot be sent.
    """

    __slots__ = ("_bytes", "_origin", "_staged", "dtype", "itemsize", "lib", "size", "values")

    lib: ModuleType  # numpy, torch or cupy: whichever adds these values
    values: Any  # [size], of that library

    def __init__(self, array: Any, *, writable: bool = True):
        kind = type(array).__module__.partition(".")[0]
        self.dtype, self.itemsize = checked_dtype(array, kind)
        self._origin = array.detach() if kind == "torch" else array
        self._bytes: Any = None
        check_layout(self._origin, kind, writable)
        flat = _contiguous(self._origin, kind, writable)
        self._staged = writable and not _shares_memory(flat, self._origin)
        self.lib, self.values = addable(flat, self.dtype)
        self.size: int = len(self.values)

    @staticmethod
    def itemsize_of(dtype: str) -> int:
        """Bytes of an element."""
        return _ITEMSIZES[dtype]

    @property
    def is_in_host_memory(self) -> bool:
        """Whether the elements, or the copy of them that stands in, can be read and written by the processor."""
        return True

    @property
    def is_in_place(self) -> bool:
        """Whether they are the array's own, and no copy of them."""
        return not self._staged

    @property
    def address(self) -> int:
        """Where it lies in memory."""
        return _address(self.values)

    def overlaps(self, other: Buffer) -> bool:
        """Whether both have elements in one place in memory."""
        mine, theirs = self.address, other.address
        return mine < theirs + other.size * other.itemsize and theirs < mine + self.size * self.itemsize

    def message(self, start: int, stop: int) -> tuple[Any, MPI.Datatype]:
        """Elements [start, stop) as mpi4py takes them. The caller keeps a message below 2 GiB."""
        if self._bytes is None:
            self._bytes = _as_bytes(self.values)
        return self._bytes[start * self.itemsize : stop * self.itemsize], MPI.BYTE

    def combine(self, start: int, stop: int, op: Op, other: Buffer) -> None:
        """Elements [start, stop) become their sum (or maximum) with the first stop - start elements of `other`."""
        accumulate(self.lib, op, self.values[start:stop], other.values[: stop - start])

    def replace(self, start: int, stop: int, source: Buffer, first: int) -> None:
        """Elements [start, stop) become those of `source` from `first` on."""
        self.values[start:stop] = source.values[first : first + stop - start]

    def expect(self, ranges: Iterable[tuple[int, int]]) -> Iterable[Pending]:
        """Of what is here now the operation will want these elements, in this order, and no others.

        Returns what an algorithm has to wait for before it begins.
        """
        return ()

    def coming(self, start: int, stop: int) -> Iterable[Pending]:
        """What an algorithm has to wait for before elements [start, stop) are touched or handed to MPI.

        Memory of the host is there. What a GPU has not brought yet is waited for like a message, with a deadline.
        """
        return ()

    def settle(self, start: int, stop: int) -> None:
        """Elements [start, stop) have their final value. Memory of one rank is then done with them."""

    def fresh(self, size: int) -> Buffer:
        """Memory for as many elements that are to be combined with these."""
        if isinstance(self.values, torch.Tensor):
            return Buffer(torch.empty(size, dtype=self.values.dtype, device="cpu"))
        return Buffer(np.empty(size, self.values.dtype))

    def scale(self, start: int, stop: int, factor: float) -> None:
        """Multiplies elements [start, stop)."""
        self.values[start:stop] *= factor

    def convert(self, other: Buffer) -> Algorithm:
        """All elements become those of `other`, which are of another dtype."""
        yield from other.coming(0, other.size)
        mine, theirs = (
            buffer.values if isinstance(buffer.values, torch.Tensor) else torch.from_numpy(buffer.values)
            for buffer in (self, other)
        )
        mine.copy_(theirs)
        self.commit()

    def commit(self) -> None:
        """Writes the result back where the array could not be viewed in place."""
        if not self._staged:
            return
        if isinstance(self._origin, torch.Tensor):
            values = self.values if isinstance(self.values, torch.Tensor) else torch.from_numpy(self.values)
            self._origin.copy_(values.view(self._origin.shape))
        else:
            array = self.values.numpy() if isinstance(self.values, torch.Tensor) else self.values
            self._origin[...] = array.reshape(self._origin.shape)

    def require(self, op: Op) -> None:
        """Refuses an operation that would be silently wrong for this dtype."""
        if op not in ("sum", "mean", "max"):
            raise MessageError(f"operation {op!r} is unknown: use 'sum', 'mean' or 'max'")
        if self.dtype == "bool":
            raise MessageError(f"{op} of booleans is not defined: convert them to integers first")
        if op == "mean" and self.dtype in _INTEGERS:
            raise MessageError(f"the mean of {self.dtype} values is not an integer: convert to a float, or use 'sum'")


def checked_dtype(array: Any, kind: str) -> tuple[str, int]:
    """The dtype's name in numpy and torch alike, and its bytes; refuses what is no array and what cannot be moved."""
    if kind not in ("numpy", "torch", "cupy") or not hasattr(array, "dtype"):
        what = type(array).__name__
        raise MessageError(f"{what} is not an array that can be sent: give a torch tensor, a numpy or CuPy array")
    dtype = _NAMES.get(array.dtype)
    if dtype is None:
        name = str(array.dtype).removeprefix("torch.")
        raise MessageError(f"dtype {name} cannot be sent: use one of {', '.join(MOVABLE)}")
    return dtype, _ITEMSIZES[dtype]


def check_layout(array: Any, kind: str, writable: bool) -> None:
    """Refuses memory in which the elements, or the result, cannot be."""
    if kind == "torch" and array.layout != torch.strided:
        raise MessageError(f"a tensor of layout {array.layout} cannot be sent: call to_dense() first")
    if kind == "torch" and array.device.type not in ("cpu", "cuda"):
        raise MessageError(f"a tensor on device {array.device} cannot be sent: move it to the CPU or a CUDA device")
    if kind == "numpy" and isinstance(array, np.ma.MaskedArray):
        raise MessageError("a masked array cannot be sent, its mask would be lost: call filled() first")
    if kind == "numpy" and writable and not array.flags.writeable:
        raise MessageError("the numpy array is read-only, and the result is written into it: give a copy")
    if writable and not is_contiguous(array, kind) and _repeats_elements(array):
        raise MessageError("the array repeats elements (broadcast or expanded) and cannot hold a result: give a copy")


def accumulate(lib: ModuleType, op: Op, total: Any, values: Any) -> None:
    """total becomes its sum (or maximum) with values, both of the library `lib`."""
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite sum is for the caller to judge
        (lib.maximum if op == "max" else lib.add)(total, values, out=total)


class Scratch:
    """Memory for what arrives, kept from one operation to the next: fresh pages cost as much as the adding.

    It serves operations that run one after the other, as those of one communicator do.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, object], list[Buffer]] = {}

    def take(self, like: Buffer, size: int, count: int) -> list[Buffer]:
        """`count` buffers of at least `size` elements, of the dtype and on the device of `like`."""
        key = like.dtype, getattr(like.values, "device", None)
        kept = self._kept.get(key, [])
        if len(kept) < count or kept[0].size < size:
            kept = self._kept[key] = [like.fresh(size) for _ in range(count)]
        return kept[:count]


def is_contiguous(array: Any, kind: str) -> bool:
    return bool(array.is_contiguous() if kind == "torch" else array.flags.c_contiguous)


def _contiguous(array: Any, kind: str, writable: bool) -> Any:
    """The array itself, flat, or a flat copy of it."""
    if kind == "torch":  # an empty tensor may have stride 0, which cannot be viewed as bytes
        return array.resolve_neg().contiguous().view(-1) if array.numel() else array.new_empty(0)
    if not writable and not array.flags.writeable and array.dtype == np.float16:
        return array.flatten()  # torch, which adds float16, would warn of memory that it must not write
    if not array.flags.aligned:
        return np.array(array).reshape(-1)
    return np.ascontiguousarray(array).reshape(-1)


def addable(flat: Any, dtype: str) -> tuple[ModuleType, Any]:
    """(library, values) over the memory of `flat`: numpy on the CPU, but for what numpy lacks or adds one by one."""
    if isinstance(flat, torch.Tensor):
        return (torch, flat) if dtype in ("float16", "bfloat16") else (np, flat.numpy())
    return (torch, torch.from_numpy(flat)) if dtype == "float16" else (np, flat)


def _as_bytes(values: Any) -> Any:
    """The same memory as MPI takes it."""
    return values.view(np.uint8) if isinstance(values, np.ndarray) else values.view(torch.uint8).numpy()


def _address(values: Any) -> int:
    return int(values.data_ptr() if isinstance(values, torch.Tensor) else values.__array_interface__["data"][0])


def _repeats_elements(array: Any) -> bool:
    """Whether several of its elements are one place in memory."""
    strides = array.stride() if isinstance(array, torch.Tensor) else array.strides
    return any(stride == 0 and length > 1 for stride, length in zip(strides, array.shape, strict=True))


def _shares_memory(flat: Any, origin: Any) -> bool:
    """Whether `flat` is a view of `origin`, not a copy."""
    if isinstance(origin, torch.Tensor):
        return isinstance(flat, torch.Tensor) and flat.data_ptr() == origin.data_ptr()
    return _address(flat) == _address(origin) or flat.size == 0
