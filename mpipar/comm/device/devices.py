"""Which arrays are on a GPU, and what they are to the algorithms that send messages."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpipar.comm.buffers import Buffer
from mpipar.comm.device.cuda import open_gpu
from mpipar.comm.device.gpu import Gpu
from mpipar.comm.device.staging import Staged
from mpipar.comm.device.transport import Transport
from mpipar.comm.device.views import View
from mpipar.comm.environment import require_other_threads


def gpu_of(array: Any) -> Gpu | None:
    """The GPU that an array is on.

    Raises:
        ConfigError: CuPy is missing, or cannot use it; or MPI may be called from the main thread only.
    """
    if isinstance(array, np.ndarray):
        return None
    if isinstance(array, Tensor):
        return gpu_on(array.device) if array.is_cuda else None
    return _gpu(array.device.id) if type(array).__module__.partition(".")[0] == "cupy" else None


def gpu_on(device: torch.device) -> Gpu | None:
    """The GPU that torch means; None for the CPU."""
    if device.type != "cuda":
        return None
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def buffer_of(array: Any, transport: Transport, *, writable: bool = True, reads: bool = True) -> Buffer:
    """What messages and sums of an array are made of, wherever it is.

    Args:
        array: A torch tensor, numpy or CuPy array.
        transport: What carries it, if it is on a GPU.
        writable: Whether the operation writes into it.
        reads: Whether the operation wants to know what is in it before.
    """
    gpu = gpu_of(array)
    if gpu is None:
        return Buffer(array, writable=writable)
    if transport == "mpi":
        return View(gpu, array, writable=writable)
    return Staged(gpu, array, writable=writable, reads=reads)


@cache
def _gpu(index: int) -> Gpu:
    require_other_threads()
    return Gpu(open_gpu(index))
