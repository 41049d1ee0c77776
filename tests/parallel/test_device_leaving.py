"""Ranks with GPUs that leave, die, or hang: nobody's memory goes while it is used, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mpipar.comm import Communicator
from mpipar.comm.device import devices
from mpipar.comm.device.gpu import Gpu
from mpipar.comm.failure import part
from mpipar.comm.pending import Pending
from mpipar.errors import StallError
from tests.parallel.gpus import GPU, opened
from tests.stand_in.board import Misuse
from tests.stand_in.runtime import StandIn
from tests.sums import check, draw, expected


def test_no_stream_waits_for_a_rank_that_may_die(careful: Communicator, device: StandIn, way: str) -> None:
    """What is done in which order follows from what the hosts have seen before they met."""
    size, n = 4 * 4099, careful.size
    arena = opened(careful, 1 << 18)
    x, y = (arena.allocate(size, torch.float32, GPU) for _ in range(2))
    for i in range(3):
        for values, other in ((x, y), (y, x)):
            device.put(values, draw(size, careful.rank, torch.float32))
            if careful.rank == i % n:
                sum(range(200_000))  # this one comes late
            works = [careful.start_all_reduce(values), careful.start_all_reduce(values, "max")]
            for work in works:
                work.wait()
            careful.reduce_scatter(other)
            careful.all_gather(other)
    total = expected(careful, size, torch.float32, "sum")
    check(device.get(x), total * n)
    check(device.get(y), total)
    assert device.waits_for_others == 0
    careful.close_arena(arena)


def test_a_host_that_does_not_wait_before_it_meets(
    careful: Communicator, device: StandIn, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in sees it, also where the sum came out right."""
    arena = opened(careful, 1 << 18)
    x = arena.allocate(1000, torch.float32, GPU)

    def hasty(gpu: Gpu, stream: int) -> Iterator[Pending]:
        return iter(())

    device.put(x, torch.ones(1000))
    monkeypatch.setattr(Gpu, "through", hasty)
    with pytest.raises(Misuse, match="missing wait"):
        careful.all_reduce(x)


def test_survivors_keep_their_segments(careful: Communicator, device: StandIn) -> None:
    """The last rank is gone: the others reduce in what is left, and close what was the dead one's."""
    if careful.size < 3:
        pytest.skip("of two ranks one would be left")
    arena = opened(careful, 1 << 18)
    x = arena.allocate(30_000, torch.float32, GPU)
    origins = careful.neighbours
    device.put(x, torch.ones(30_000))
    careful.all_reduce(x, algorithm="auto")
    if careful.rank == careful.size - 1:
        device.die()
    smaller = careful.split("survivors", color=int(careful.rank < careful.size - 1), key=careful.rank)
    if careful.rank < careful.size - 1:
        left = smaller.adopt_arena(arena, origins)
        device.put(x, torch.ones(30_000))
        smaller.all_reduce(x)
        assert (device.get(x) == smaller.size).all()
        smaller.close_arena(left)


def test_nobody_leaves_before_its_gpu_is_done_with_memory_of_others(comm: Communicator, device: StandIn) -> None:
    arena = opened(comm, 1 << 18)
    x = arena.allocate(30_000, torch.float32, GPU)
    comm.all_reduce(x, "max")
    assert device.is_busy(arena.stream), "nobody has asked for it yet"
    part(comm)
    assert not device.is_busy(arena.stream)
    comm.close_arena(arena)


def test_a_gpu_that_does_not_end_is_not_waited_for_for_ever(
    comm: Communicator, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = devices.gpu_on(GPU)
    assert gpu is not None
    comm.progress.gpus[gpu] = gpu.stream("arena")
    with monkeypatch.context() as hung:
        hung.setattr(device, "reached", lambda event: False)
        hung.setattr(comm.progress, "timeout_s", 0.3)
        with pytest.raises(StallError, match="has not done what this rank gave it"):
            part(comm)
    part(comm)
