"""Arrays on a GPU through pinned memory of the host."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from mpipar.comm import Communicator
from mpipar.comm.buffers import Op
from mpipar.comm.device import devices
from mpipar.comm.device.runtime import DeviceError
from mpipar.comm.mpi import MPI
from mpipar.errors import ConfigError, MessageError
from tests.parallel.gpus import GPU
from tests.stand_in.runtime import StandIn
from tests.sums import check, draw, expected


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_staged_all_reduce(comm: Communicator, device: StandIn, dtype: torch.dtype, op: Op) -> None:
    if op == "mean" and not dtype.is_floating_point:
        return
    for size in (1, 5, 4099, 300_000):
        x = device.array(size, dtype)
        for algorithm in ("auto", "ring"):
            device.put(x, draw(size, comm.rank, dtype))
            comm.all_reduce(x, op, algorithm)
            check(device.get(x), expected(comm, size, dtype, op), op)


def test_staged_shards(comm: Communicator, device: StandIn) -> None:
    size = 700_001
    x = device.array(size, torch.float32)
    device.put(x, draw(size, comm.rank, torch.float32))
    comm.reduce_scatter(x)
    comm.all_gather(x)
    check(device.get(x), expected(comm, size, torch.float32, "sum"))


def test_staged_messages_between_two(comm: Communicator, device: StandIn) -> None:
    """Round the ring; what is received is not brought down first, and what is sent is not sent before it was made."""
    out, into = device.array(400_000, torch.float32), device.array(400_000, torch.float32)
    device.put(out, draw(len(out), comm.rank, torch.float32))
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    works = [comm.start_send(out, right), comm.start_receive(into, left)]
    for work in works:
        work.wait()
    check(device.get(into), draw(len(out), left, torch.float32).double())


def test_staged_together_with_the_host(comm: Communicator, device: StandIn) -> None:
    """Arrays of both kinds, started together."""
    on_gpu, on_host = device.array(90_000, torch.float32), torch.full((90_000,), 2.0)
    device.put(on_gpu, torch.ones(90_000))
    for work in [comm.start_all_reduce(on_gpu), comm.start_all_reduce(on_host)]:
        work.wait()
    assert (device.get(on_gpu) == comm.size).all() and (on_host == 2 * comm.size).all()


def test_pinned_memory_is_taken_again(comm: Communicator, device: StandIn) -> None:
    x = device.array(100_000, torch.float32)
    for _ in range(4):
        device.put(x, torch.ones(100_000))
        comm.all_reduce(x, algorithm="ring")
    device.finish()
    assert len(device.pinned_memory) <= 1


@pytest.mark.parametrize("num_bytes", [0, 1, 65_536, 65_537, 1 << 20, (1 << 20) + 1, 3_000_000_001])
def test_pinned_memory_is_little_larger_than_what_goes_through_it(
    device: StandIn, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    gpu = devices.gpu_on(GPU)
    assert gpu is not None
    monkeypatch.setattr(device.pinned_memory, "allocate", lambda size: 4096)
    with pytest.raises(StopIteration) as taken:  # nobody has to be waited for
        next(gpu.pinned.take(num_bytes))
    _, size = taken.value.value
    assert num_bytes <= size <= num_bytes * 9 // 8 + 65_536


def test_a_host_that_cannot_pin_so_much_is_one_message(
    comm: Communicator, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(num_bytes: int) -> int:
        raise DeviceError("cudaErrorMemoryAllocation: out of memory")

    x = device.array(100_000, torch.float32)
    monkeypatch.setattr(device.pinned_memory, "allocate", refused)
    with pytest.raises(MessageError, match=r"458,752 bytes of the host's memory cannot be pinned.*: out of memory"):
        comm.start_send(x, comm.rank).wait()


def test_a_call_that_is_refused_keeps_no_event(comm: Communicator, device: StandIn) -> None:
    x, y = device.array(10, torch.float32), device.array(9, torch.float64)
    for _ in range(5):
        with pytest.raises(MessageError, match="do not cut"):
            comm.all_gather(x, sizes=[1] * comm.size)
        with pytest.raises(MessageError, match="must have one dtype"):
            comm.all_to_all(x, y)
    gc.collect()  # errors that keep what they were raised for
    gpu = devices.gpu_on(GPU)
    assert gpu is not None and len(gpu._events) == device.num_events


def test_one_rank_has_nothing_to_do(comm: Communicator, device: StandIn) -> None:
    """Nothing is copied anywhere, and nobody waits."""
    alone = comm.split("alone", color=comm.rank, key=0)
    x, into = device.array(1000, torch.float64), device.array(1000, torch.float32)
    device.put(x, torch.ones(1000))
    alone.all_reduce(x, "mean")
    alone.reduce_scatter(x)
    alone.all_gather(x)
    alone.broadcast(x)
    alone.start_all_reduce_into(into, x).wait()
    assert not device.pinned_memory and device.asked == 0
    assert (device.get(into) == 1).all()


def test_backward_on_a_gpu_calls_mpi_from_its_own_thread(comm: Communicator) -> None:
    """As torch has it: the main thread waits meanwhile."""
    x = torch.full((50_000,), float(comm.rank))
    thread = threading.Thread(target=lambda: comm.all_reduce(x, algorithm="ring"))
    thread.start()
    thread.join()
    comm.all_reduce(x, algorithm="ring")
    assert (x == comm.size * comm.size * (comm.size - 1) / 2).all()


def test_an_mpi_for_the_main_thread_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MPI.Query_thread() >= MPI.THREAD_SERIALIZED
    monkeypatch.setattr(MPI, "Query_thread", lambda: MPI.THREAD_FUNNELED)
    with pytest.raises(ConfigError, match="thread level 'funneled'"):
        devices.gpu_on(GPU)
