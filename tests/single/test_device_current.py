"""A rank's GPU is not always the current one of its thread: everything is done on the GPU it is for, and no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mpipar.comm.device import cuda, views
from mpipar.comm.device.cuda import Cuda
from mpipar.comm.device.gpu import Gpu
from mpipar.comm.device.runtime import Addition, Rounding, Runtime
from mpipar.comm.device.staging import Staged
from mpipar.comm.device.views import View
from tests.stand_in.board import Misuse
from tests.stand_in.cupy import Cupy


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Cupy:
    """GPU 0 is the current one."""
    cupy = Cupy()
    monkeypatch.setattr(cuda, "import_cupy", lambda: cupy)
    return cupy


def test_every_call_is_made_on_its_gpu(cupy: Cupy) -> None:
    gpu = Cuda(1)
    stream, event, memory, pinned = gpu.stream(), gpu.event(shared=True), gpu.allocate(64), gpu.pinned(64)
    array = cupy.array(np.zeros(4, np.float32), 1)
    addition = Addition((memory,), memory, 0, 0, None, 4, "float32", "float32", "sum")
    rounding = Rounding(memory, memory, 4, "float32", 1.0, True, memory)
    opened = gpu.open_memory(gpu.export_memory(memory)), gpu.open_event(gpu.export_event(event))
    calls: dict[str, Callable[[], object]] = {
        "current_stream": lambda: gpu.current_stream("cupy"),
        "record": lambda: gpu.record(event, stream),
        "wait": lambda: gpu.wait(stream, event),
        "reached": lambda: gpu.reached(event),
        "copy": lambda: gpu.copy(memory, pinned, 64, stream),
        "copy_elements": lambda: gpu.copy_elements(array, array, stream),
        "zero": lambda: gpu.zero(memory, 64, stream),
        "tensor": lambda: gpu.tensor(memory, 64, None),
        "add": lambda: gpu.add(addition, stream),
        "round_and_add": lambda: gpu.round_and_add(rounding, stream),
        "unreachable": lambda: gpu.unreachable("0000:01:00.0"),
        "close_memory": lambda: gpu.close_memory(opened[0]),
        "destroy_event": lambda: gpu.destroy_event(opened[1]),
        "free": lambda: gpu.free(memory),
        "free_pinned": lambda: gpu.free_pinned(pinned),
    }
    before = {"stream", "event", "allocate", "pinned", "open_memory", "export_memory", "open_event", "export_event"}
    of_torch = {"on"}  # it makes the stream's GPU the current one
    assert calls.keys() | before | of_torch == {
        name for name, member in vars(Runtime).items() if callable(member) and not name.startswith("_")
    } - {"current"}
    for name, call in calls.items():
        call()
        assert cupy.gpus.current == 0, f"{name} leaves another GPU current"
    assert cupy.gpus.touched == {1}, "nobody made a context on another GPU"


def test_a_call_with_another_gpu_current_is_seen(cupy: Cupy) -> None:
    gpu = Cuda(1)
    stream, event = gpu.stream(), gpu.event()
    with pytest.raises(Misuse, match="while GPU 0 is current"):
        cupy.cuda.runtime.eventRecord(event, stream)


@pytest.mark.parametrize("kind", [Staged, View])
def test_arrays_of_cupy_are_copied_on_their_own_gpu(cupy: Cupy, kind: type[Staged] | type[View]) -> None:
    gpu = Gpu(Cuda(1))
    for values in (np.zeros((4, 6), np.float32), np.zeros((4, 6), np.float32)[:, ::2]):
        buffer = kind(gpu, cupy.array(values, 1))
        assert buffer._flat.device.id == 1 and buffer.is_contiguous == values.flags.c_contiguous
        buffer.put_back()
    assert cupy.gpus.touched == {1} and cupy.gpus.current == 0


def test_mpi_is_given_arrays_of_their_own_gpu(cupy: Cupy, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_message(raw: torch.Tensor) -> object:
        cupy.gpus.use()
        return raw.numpy()

    monkeypatch.setattr(views, "as_message", as_message)
    view = View(Gpu(Cuda(1)), cupy.array(np.zeros(4, np.float32), 1))
    assert all(pending.through() for pending in view.coming(0, 4))
    view.message(0, 4)
    assert cupy.gpus.touched == {1}


class Slow:
    """Streams that take long to make."""

    def __init__(self) -> None:
        self.made = 0

    def stream(self) -> int:
        self.made += 1
        number = self.made
        time.sleep(0.01)
        return number


def test_threads_are_given_one_stream_for_one_purpose() -> None:
    runtime = Slow()
    gpu = Gpu(runtime)  # type: ignore[arg-type]
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(gpu.stream("arena"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1, 1, 1, 1]
