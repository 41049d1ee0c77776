"""A GPU through CuPy: `runtime.Runtime`. No other file imports CuPy or calls CUDA.

Three libraries share the GPU: torch, whose streams the arrays come from, CuPy, and this package. All of them use the
GPU's primary context, so an address or a stream of one means the same to the others. What each has of its own is the
*current* stream: torch's is asked for by name, and CuPy's is set for the length of a launch only.

A thread has a current device, and stream 0 is that of the current device. So every call that takes a stream, or makes
something, is made with this GPU current; what was current before is afterwards, since autograd's threads are torch's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mpipar.comm.buffers import Buffer
from mpipar.comm.device import kernels
from mpipar.comm.device.runtime import Addition, DeviceError, Library, Rounding
from mpipar.errors import ConfigError

_NOT_READY = 600  # cudaErrorNotReady
_OLDEST_CUPY = 13


@cache
def open_gpu(index: int) -> Cuda:
    """The GPU of this number in this process. CuPy is imported here, and nowhere before.

    Raises:
        ConfigError: CuPy is missing, or is not for this machine.
    """
    return Cuda(index)


def as_message(raw: Tensor) -> Any:
    """[n] uint8 on a GPU as mpi4py takes it: CuPy's view of the same memory."""
    return importlib.import_module("cupy").from_dlpack(raw)


class Cuda:
    """One GPU. Its methods are those of `runtime.Runtime`."""

    def __init__(self, index: int):
        self._cupy = import_cupy()
        self._api = self._cupy.cuda.runtime
        self._index = index
        try:
            with self.current():
                self._api.free(self._api.malloc(256))  # makes the context, or says why there can be none
                self.name: str = self._api.deviceGetPCIBusId(index)
                self._processors: int = self._api.deviceGetAttribute(self._api.cudaDevAttrMultiProcessorCount, index)
                self._kernel(kernels.NOTHING, (), "nothing")  # or there is no compiler for them
        except (RuntimeError, ImportError, self._cupy.cuda.compiler.CompileException) as error:
            raise ConfigError(
                f"CuPy {self._cupy.__version__} cannot use GPU {index}: {error}. It has to be for the CUDA of torch, "
                f"{torch.version.cuda}, and for the driver: {_remedy(torch.version.cuda)}"
            ) from error
        self._streams: dict[int, Any] = {}

    def current(self) -> AbstractContextManager[object]:
        # A new object each time: it knows what was current before, and several threads come here.
        device: AbstractContextManager[object] = self._cupy.cuda.Device(self._index)
        return device

    def current_stream(self, library: Library) -> int:
        if library == "torch":
            return int(torch.cuda.current_stream(self._index).cuda_stream)
        with self.current():
            return int(self._cupy.cuda.get_current_stream().ptr)

    def stream(self) -> int:
        with self._calling():
            return int(self._api.streamCreateWithFlags(self._api.streamNonBlocking))

    def event(self, *, shared: bool = False) -> int:
        flags = self._api.eventDisableTiming | (self._api.eventInterprocess if shared else 0)
        with self._calling():
            return int(self._api.eventCreateWithFlags(flags))

    def destroy_event(self, event: int) -> None:
        with self._calling():
            self._api.eventDestroy(event)

    def record(self, event: int, stream: int) -> None:
        with self._calling():
            self._api.eventRecord(event, stream)

    def wait(self, stream: int, event: int) -> None:
        with self._calling():
            self._api.streamWaitEvent(stream, event)

    def reached(self, event: int) -> bool:
        with self._calling():
            # "Not ready" stays the last error of CuPy's runtime, which is linked into it: torch looks at its own.
            status: int = self._api.eventQuery(event)
            if status not in (0, _NOT_READY):
                raise self._api.CUDARuntimeError(status)
        return status == 0

    def allocate(self, num_bytes: int) -> int:
        with self._calling():
            return int(self._api.malloc(num_bytes))

    def free(self, address: int) -> None:
        with self._calling():
            self._api.free(address)

    def pinned(self, num_bytes: int) -> int:
        with self._calling():
            return int(self._api.hostAlloc(num_bytes, self._api.hostAllocPortable))

    def free_pinned(self, address: int) -> None:
        with self._calling():
            self._api.freeHost(address)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        with self._calling():
            self._api.memcpyAsync(target, source, num_bytes, self._api.memcpyDefault, stream)

    def copy_elements(self, target: Any, source: Any, stream: int) -> None:
        if isinstance(target, Tensor):
            with self.on(stream):
                target.copy_(source.view(target.shape))
        else:
            with self._calling(), self._stream(stream):
                target[...] = source.reshape(target.shape)

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        with self._calling():
            self._api.memsetAsync(address, 0, num_bytes, stream)

    def tensor(self, address: int, num_bytes: int, owner: object) -> Tensor:
        with self._calling():
            memory = self._cupy.cuda.UnownedMemory(address, num_bytes, owner, self._index)
            array = self._cupy.ndarray((num_bytes,), "uint8", self._cupy.cuda.MemoryPointer(memory, 0))
            return from_dlpack(array)

    def on(self, stream: int) -> AbstractContextManager[object]:
        if stream == 0:
            return torch.cuda.stream(torch.cuda.default_stream(self._index))
        return torch.cuda.stream(torch.cuda.ExternalStream(stream, self._index))

    def export_memory(self, address: int) -> bytes:
        with self._calling():
            return bytes(self._api.ipcGetMemHandle(address))

    def open_memory(self, handle: bytes) -> int:
        with self._calling():
            return int(self._api.ipcOpenMemHandle(handle))  # enables access to the peer when it is first needed

    def close_memory(self, address: int) -> None:
        with self._calling():
            self._api.ipcCloseMemHandle(address)

    def export_event(self, event: int) -> bytes:
        with self._calling():
            return bytes(self._api.ipcGetEventHandle(event))

    def open_event(self, handle: bytes) -> int:
        with self._calling():
            return int(self._api.ipcOpenEventHandle(handle))

    def unreachable(self, name: str) -> str | None:
        if name == self.name:
            return None
        try:
            peer = self._api.deviceGetByPCIBusId(name)
        except self._api.CUDARuntimeError:
            return (
                f"GPU {name} of a neighbour is hidden from this rank, which is on GPU {self.name}: let all ranks of a "
                "host see all its GPUs, CUDA_VISIBLE_DEVICES the same for all"
            )
        with self._calling():
            if not self._api.deviceCanAccessPeer(self._index, peer):
                return f"GPUs {self.name} and {name} cannot read each other's memory"
        return None

    def add(self, addition: Addition, stream: int) -> None:
        if addition.size == 0:
            return
        itemsize = Buffer.itemsize_of(addition.dtype)
        head = kernels.elements_one_by_one(addition, itemsize)
        arguments = (
            addition.table,
            len(addition.rows),
            addition.source,
            addition.target,
            addition.out or 0,
            addition.size,
            head,
            1 / len(addition.rows),
        )
        threads = addition.size if head == addition.size else addition.size * itemsize // kernels.VECTOR_BYTES
        self._launch(kernels.ADD, kernels.addition_options(addition), "add", arguments, threads, stream)

    def round_and_add(self, rounding: Rounding, stream: int) -> None:
        if rounding.size == 0:
            return
        arguments = (
            rounding.total,
            rounding.x,
            rounding.size,
            rounding.anchor,
            int(rounding.first),
            rounding.largest,
        )
        options = kernels.rounding_options(rounding.dtype)
        self._launch(kernels.ROUND_AND_ADD, options, "round_and_add", arguments, rounding.size, stream)

    def _launch(
        self, code: str, options: tuple[str, ...], name: str, arguments: tuple[int | float, ...], work: int, stream: int
    ) -> None:
        """Arguments are passed as 64 bits each, as the kernels declare them: integers signed, and doubles."""
        blocks = -(-work // kernels.THREADS)
        grid = max(1, min(blocks, self._processors * kernels.BLOCKS_PER_PROCESSOR))
        with self._calling(), self._stream(stream):
            self._kernel(code, options, name)((grid,), (kernels.THREADS,), arguments)

    @cache  # noqa: B019 (a GPU lives as long as the process)
    def _kernel(self, code: str, options: tuple[str, ...], name: str) -> Any:
        # Not CuPy's RawModule, which always flushes subnormal numbers to zero, as sums on a processor do not.
        binary, _ = self._cupy.cuda.compiler.compile_using_nvrtc(code, ("-std=c++17", *options))
        module = self._cupy.cuda.function.Module()
        module.load(binary)
        return module.get_function(name)

    def _stream(self, stream: int) -> Any:
        """CuPy's object for a stream, which makes it current where it is entered."""
        known = self._streams.get(stream)
        if known is not None:
            return known
        of_others = getattr(self._cupy.cuda.Stream, "from_external", None)
        made = self._cupy.cuda.ExternalStream(stream, self._index) if of_others is None else of_others(_Foreign(stream))
        return self._streams.setdefault(stream, made)  # one object for all threads

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Around calls of CUDA.

        Raises:
            DeviceError: CUDA refuses one.
        """
        with self.current():
            try:
                yield
            except (self._api.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError) as error:
                raise DeviceError(str(error)) from error


class _Foreign:
    """A stream by its address, in the protocol in which libraries hand each other streams."""

    def __init__(self, address: int):
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def import_cupy() -> ModuleType:
    """CuPy.

    Raises:
        ConfigError: It is missing, broken or too old; it says which package is wanted.
    """
    cuda = torch.version.cuda
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        what = "missing" if isinstance(error, ModuleNotFoundError) and error.name == "cupy" else "broken"
        reason = "" if what == "missing" else f" ({_first_line(error)})"
        raise ConfigError(f"CuPy is {what}{reason}, and carries what lies on a GPU: {_remedy(cuda)}") from error
    if int(cupy.__version__.partition(".")[0]) < _OLDEST_CUPY:
        raise ConfigError(f"CuPy {cupy.__version__} is too old: {_remedy(cuda)}")
    return cupy


def _remedy(cuda: str | None) -> str:
    major = (cuda or "12").partition(".")[0]
    return f"pip install 'mpipar[cuda{major if major in ('12', '13') else 12}]'"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip(" =")]
    return lines[-1].strip() if lines else type(error).__name__
