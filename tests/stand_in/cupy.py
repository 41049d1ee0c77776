"""CuPy, as much of it as is used, over two GPUs that are none: it computes nothing, and knows which GPU is current.

CUDA and CuPy do what they are asked to on the GPU that is current in the calling thread, and make a context there if
there is none yet. Here every stream, event, address, module and array remembers its GPU, and a call for one while
another GPU is current is a misuse.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.stand_in.board import Misuse

NUM_GPUS = 2
_NAMES = ["0000:01:00.0", "0000:02:00.0"]


class Refused(RuntimeError):
    """`cupy.cuda.runtime.CUDARuntimeError`."""


class DriverRefused(RuntimeError):
    """`cupy.cuda.driver.CUDADriverError`."""


class CompileRefused(Exception):
    """`cupy.cuda.compiler.CompileException`."""


class Gpus:
    """Which GPU is current in the one thread that there is, and what belongs to which.

    Attributes:
        touched: Those on which there is a context.
    """

    def __init__(self) -> None:
        self.current = 0
        self.touched: set[int] = set()
        self._owners: dict[int, int] = {}

    def made(self) -> int:
        """A handle of something new on the current GPU, which now has a context."""
        self.touched.add(self.current)
        handle = 0x1000 * (len(self._owners) + 1)
        self._owners[handle] = self.current
        return handle

    def use(self, *handles: int) -> None:
        """Something is done with these. Stream 0 is whichever GPU's is current, memory of the host nobody's."""
        self.touched.add(self.current)
        for handle in handles:
            owner = self._owners.get(handle, self.current)
            if owner != self.current:
                raise Misuse(f"{handle:#x} of GPU {owner} is used while GPU {self.current} is current")


class Device:
    """`cupy.cuda.Device`."""

    def __init__(self, gpus: Gpus, index: int):
        self.id = index
        self._gpus = gpus
        self._before: list[int] = []

    def __enter__(self) -> Device:
        self._before.append(self._gpus.current)
        self._gpus.current = self.id
        return self

    def __exit__(self, *_: object) -> None:
        self._gpus.current = self._before.pop()


class Stream:
    """`cupy.cuda.Stream` of somebody else."""

    def __init__(self, gpus: Gpus, ptr: int):
        self.ptr = ptr
        self._gpus = gpus

    def __enter__(self) -> Stream:
        self._gpus.use(self.ptr)
        return self

    def __exit__(self, *_: object) -> None:
        self._gpus.use(self.ptr)


class Module:
    """`cupy.cuda.function.Module`."""

    def __init__(self, gpus: Gpus):
        self._gpus = gpus
        self._handle = 0

    def load(self, binary: bytes) -> None:
        self._handle = self._gpus.made()

    def get_function(self, name: str) -> Callable[..., None]:
        return lambda grid, block, arguments: self._gpus.use(self._handle)


class Array:
    """`cupy.ndarray`, by the name of whose module it is known."""

    def __init__(self, gpus: Gpus, index: int, values: npt.NDArray[Any]):
        self.device = Device(gpus, index)
        self.dtype, self.shape, self.strides = values.dtype, values.shape, values.strides
        self.flags, self.size = values.flags, values.size
        self.data = SimpleNamespace(ptr=values.ctypes.data)
        self._gpus = gpus
        self._values = values

    def ravel(self) -> Array:
        return Array(self._gpus, self.device.id, self._values.ravel())

    def copy(self) -> Array:
        """On the GPU that is current, wherever this is."""
        return Array(self._gpus, self._gpus.current, self._values.copy())

    def reshape(self, shape: tuple[int, ...]) -> Array:
        return Array(self._gpus, self.device.id, self._values.reshape(shape))

    def __setitem__(self, where: object, values: Array) -> None:
        self._require_current()
        values._require_current()

    def __dlpack__(self, **_: object) -> object:
        self._require_current()
        return self._values.__dlpack__()

    def __dlpack_device__(self) -> tuple[Any, Any]:
        return self._values.__dlpack_device__()

    def _require_current(self) -> None:
        if self.device.id != self._gpus.current:
            raise Misuse(f"an array of GPU {self.device.id} is used while GPU {self._gpus.current} is current")


Array.__module__ = "cupy"


class Cupy:
    """The module.

    Attributes:
        gpus: What it keeps of them.
    """

    __version__ = "14.0.0"

    def __init__(self) -> None:
        self.gpus = gpus = Gpus()
        self.cuda = SimpleNamespace(
            runtime=_runtime(gpus),
            driver=SimpleNamespace(CUDADriverError=DriverRefused),
            compiler=SimpleNamespace(
                CompileException=CompileRefused, compile_using_nvrtc=lambda code, options: (b"", {})
            ),
            function=SimpleNamespace(Module=lambda: Module(gpus)),
            Device=lambda index: Device(gpus, index),
            Stream=SimpleNamespace(from_external=lambda stream: Stream(gpus, stream.__cuda_stream__()[1])),
            get_current_stream=lambda: Stream(gpus, 0),
            UnownedMemory=lambda address, num_bytes, owner, index: (address, index),
            MemoryPointer=lambda memory, offset: memory,
        )

    def ndarray(self, shape: tuple[int, ...], dtype: str, pointer: tuple[int, int]) -> Array:
        self.gpus.use(pointer[0])
        return Array(self.gpus, pointer[1], np.zeros(shape, dtype))

    def array(self, values: npt.NDArray[Any], index: int) -> Array:
        """For tests: on one of the GPUs."""
        return Array(self.gpus, index, values)


def _runtime(gpus: Gpus) -> SimpleNamespace:
    """`cupy.cuda.runtime`."""

    def made(*_: object) -> int:
        return gpus.made()

    def exported(handle: int) -> bytes:
        gpus.use(handle)
        return b"handle"

    def allocated_on_host(num_bytes: int, flags: int) -> int:
        gpus.use()
        return 1

    def queried(event: int) -> int:
        gpus.use(event)
        return 0

    return SimpleNamespace(
        CUDARuntimeError=Refused,
        cudaDevAttrMultiProcessorCount=16,
        eventDisableTiming=2,
        eventInterprocess=4,
        hostAllocPortable=1,
        memcpyDefault=4,
        streamNonBlocking=1,
        deviceGetPCIBusId=lambda index: _NAMES[index],
        deviceGetByPCIBusId=_NAMES.index,
        deviceGetAttribute=lambda attribute, index: 132,
        deviceCanAccessPeer=lambda index, peer: 1,
        streamCreateWithFlags=made,
        eventCreateWithFlags=made,
        malloc=made,
        hostAlloc=allocated_on_host,
        ipcOpenMemHandle=made,
        ipcOpenEventHandle=made,
        eventDestroy=gpus.use,
        eventRecord=gpus.use,
        streamWaitEvent=gpus.use,
        eventQuery=queried,
        free=gpus.use,
        freeHost=gpus.use,
        memcpyAsync=lambda target, source, num_bytes, kind, stream: gpus.use(target, source, stream),
        memsetAsync=lambda address, value, num_bytes, stream: gpus.use(address, stream),
        ipcGetMemHandle=exported,
        ipcCloseMemHandle=gpus.use,
        ipcGetEventHandle=exported,
    )
