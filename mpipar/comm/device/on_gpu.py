"""An array on a GPU, as operations first see it: where it is, and whose stream it is on."""

from __future__ import annotations

from typing import Any

from mpipar.comm.buffers import Buffer, check_layout, checked_dtype, is_contiguous
from mpipar.comm.device.gpu import Caller, Gpu
from mpipar.comm.device.runtime import Library


class OnGpu(Buffer):
    """What `staging.Staged` and `views.View` have in common: nothing has been copied yet.

    Args:
        gpu: Where the array is.
        array: A torch tensor or CuPy array, of any shape. One that is not contiguous is copied here, on the caller's
            stream, and copied back by `commit`.
        writable: Whether the operation writes into it.

    Attributes:
        gpu: The same.
        caller: The stream on which the array was made, and will be used.
        is_contiguous: Whether the array itself is at `address`, and no copy of it.
    """

    __slots__ = ("_flat", "_writable", "caller", "gpu", "is_contiguous")

    def __init__(self, gpu: Gpu, array: Any, *, writable: bool):
        kind: Library = "cupy" if type(array).__module__.partition(".")[0] == "cupy" else "torch"
        self.dtype, self.itemsize = checked_dtype(array, kind)
        self._origin = array.detach() if kind == "torch" else array
        check_layout(self._origin, kind, writable)
        self.is_contiguous = is_contiguous(self._origin, kind) and not (kind == "torch" and self._origin.is_neg())
        with gpu.runtime.current():  # CuPy copies to the current GPU, wherever the array is
            if kind == "torch":
                self._flat = self._origin.resolve_neg().contiguous().view(-1)
            else:
                self._flat = self._origin.ravel() if self.is_contiguous else self._origin.copy().ravel()
        self._writable = writable
        self._bytes = None
        self._staged = False
        self.size = int(self._flat.numel() if kind == "torch" else self._flat.size)
        self.gpu = gpu
        self.caller = Caller(gpu, kind)  # behind the copy, if there was one

    @property
    def is_in_place(self) -> bool:
        return False

    @property
    def address(self) -> int:
        """Where it lies in the memory of the device."""
        return int(self._flat.data_ptr() if hasattr(self._flat, "data_ptr") else self._flat.data.ptr)

    def put_back(self) -> None:
        """On the caller's stream: what is not contiguous gets the values of its copy."""
        if not self.is_contiguous and self._writable:
            self.gpu.runtime.copy_elements(self._origin, self._flat, self.caller.stream)

    def copy_from(self, other: OnGpu) -> None:
        """On the caller's stream: all elements become those of another array on this GPU, converted."""
        self.gpu.runtime.copy_elements(self._origin, other._flat, self.caller.stream)
