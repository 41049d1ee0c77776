"""A GPU that does not come to an end: whoever waits for it gives up in time, says so, and can go on when it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

from mpipar.comm import Communicator, Work
from mpipar.errors import StallError
from tests.parallel.gpus import GPU
from tests.stand_in.runtime import StandIn

Hung = Callable[[], AbstractContextManager[None]]
WHY = "GPU 0000:00:00.0 has not done what this rank gave it: a kernel does not end"


@pytest.fixture
def hung(comm: Communicator, device: StandIn, monkeypatch: pytest.MonkeyPatch) -> Hung:
    """Where it is entered the GPU gets nowhere; who waits for it gives up soon."""

    @contextmanager
    def entered() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(device, "reached", lambda event: False)
            patch.setattr(comm.progress, "timeout_s", 0.3)
            yield

    return entered


STARTS: dict[str, Callable[[Communicator, Tensor], Work]] = {
    "send": lambda comm, x: comm.start_send(x, comm.rank),
    "ring": lambda comm, x: comm.start_all_reduce(x, "sum", "ring"),
    "mpi": lambda comm, x: comm.start_all_reduce(x, "sum", "mpi"),
    "reduce_scatter": lambda comm, x: comm.start_reduce_scatter(x),
    "all_gather": lambda comm, x: comm.start_all_gather(x),
    "all_to_all": lambda comm, x: comm.start_all_to_all(x, torch.empty(len(x))),
}


@pytest.mark.parametrize("what", STARTS)
def test_an_operation_gives_up(comm: Communicator, device: StandIn, hung: Hung, what: str) -> None:
    if comm.size == 1 and what != "send":
        pytest.skip("one rank has nothing to do")
    x = device.array(1200, torch.float32)
    device.put(x, torch.ones(1200))
    with hung():
        work = STARTS[what](comm, x)  # at once
        with pytest.raises(StallError, match=WHY):
            work.wait()
    comm.barrier() if what == "send" else work.wait()  # a collective begins when those before are done
    if what == "send":
        received = comm.receive(torch.zeros(1200), comm.rank)
        work.wait()
        assert (received == 1).all()


def test_pinned_memory_that_is_in_use_is_waited_for_in_time(comm: Communicator, device: StandIn, hung: Hung) -> None:
    given, into = torch.arange(40_000.0), device.array(40_000, torch.float32)
    sends = [comm.start_send(given, comm.rank) for _ in range(2)]
    comm.receive(into, comm.rank)
    with hung():
        work = comm.start_receive(into, comm.rank)
        with pytest.raises(StallError, match=WHY):
            work.wait()
    for each in (work, *sends):
        each.wait()
    assert torch.equal(device.get(into), given)
    assert len(device.pinned_memory) == 1


def test_sends_of_a_channel_keep_their_order(comm: Communicator, device: StandIn, hung: Hung) -> None:
    """One from the host's memory could go at once, and stays behind one that comes from a GPU; others do not."""
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    on_gpu = device.array(500, torch.float32)
    device.put(on_gpu, torch.ones(500))
    with hung():
        works = [
            comm.start_send(on_gpu, right),
            comm.start_send(torch.full((500,), 2.0), right),
            comm.start_send(torch.full((500,), 3.0), right, tag=1),
        ]
        assert (comm.receive(torch.zeros(500), left, tag=1) == 3).all()
        with pytest.raises(StallError, match=WHY):
            works[1].wait()
    assert [comm.receive(torch.zeros(500), left)[0].item() for _ in range(2)] == [1, 2]
    for work in works:
        work.wait()


def test_what_was_caught_up_with_is_there(comm: Communicator, device: StandIn, hung: Hung) -> None:
    x = device.array(1000, torch.float32)
    device.put(x, torch.ones(1000))
    with hung(), pytest.raises(StallError, match=WHY):
        comm.catch_up(GPU)
    comm.catch_up(GPU)
    assert (x == 1).all()
    comm.catch_up(torch.device("cpu"))


def test_who_waits_for_a_gpu_leaves_the_processor_to_others(comm: Communicator, device: StandIn, hung: Hung) -> None:
    with hung():
        comm.progress.timeout_s = 1.0
        began_s, used_s = time.monotonic(), time.process_time()
        with pytest.raises(StallError):
            comm.catch_up(GPU)
        used_s, waited_s = time.process_time() - used_s, time.monotonic() - began_s
    comm.catch_up(GPU)
    assert used_s < 0.4 * waited_s
