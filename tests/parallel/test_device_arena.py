"""Arrays in memory of GPUs that ranks open in each other: the same sums as float64, and no missing wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpipar.comm import Communicator
from mpipar.comm.buffers import Op
from mpipar.comm.device import arena as arena_module
from mpipar.comm.device import collectives, devices
from mpipar.comm.device.arena import DeviceArena, aligned
from mpipar.comm.device.gpu import Gpu
from mpipar.errors import MessageError
from tests.parallel.gpus import GPU, opened
from tests.stand_in.runtime import StandIn
from tests.sums import check, draw, expected

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8]
SIZES = [1, 3, 127, 128, 4099, 20_001]


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce(comm: Communicator, device: StandIn, way: str, dtype: torch.dtype, op: Op) -> None:
    if op == "mean" and not dtype.is_floating_point:
        return
    arena = opened(comm, sum(aligned(size * dtype.itemsize) for size in SIZES))
    before, asked = comm.bytes_sent, device.asked
    arrays = [arena.allocate(size, dtype, GPU) for size in SIZES]
    for x in arrays:
        for _ in range(2):
            device.put(x, draw(len(x), comm.rank, dtype))
            comm.all_reduce(x, op)
    assert comm.bytes_sent == before and device.asked == asked, "nothing was sent, and no host waited"
    for x in arrays:
        check(device.get(x), expected(comm, len(x), dtype, op), op)
    comm.close_arena(arena)


def test_a_part_of_what_was_allocated(comm: Communicator, device: StandIn, way: str) -> None:
    """A view is reduced alone, wherever it begins; what lies around it is not touched."""
    arena = opened(comm, 1 << 16)
    x = arena.allocate(10_000, torch.float32, GPU)
    for start, stop in [(1, 10), (103, 9357), (4, 8)]:
        device.put(x, torch.full((10_000,), float(comm.rank)))
        comm.all_reduce(x[start:stop])
        found = device.get(x)
        assert (found[start:stop] == comm.size * (comm.size - 1) / 2).all()
        assert (found[:start] == comm.rank).all() and (found[stop:] == comm.rank).all()
    comm.close_arena(arena)


@pytest.mark.parametrize("sizes", ["even", "uneven"])
def test_reduce_scatter_then_all_gather(comm: Communicator, device: StandIn, sizes: str) -> None:
    size = 4 * 4099
    cut = None if sizes == "even" else [size - comm.size + 1, *[1] * (comm.size - 1)]
    arena = opened(comm, 4 * size)
    x = arena.allocate(size, torch.float32, GPU)
    device.put(x, draw(size, comm.rank, torch.float32))
    comm.reduce_scatter(x, sizes=cut)
    comm.all_gather(x, sizes=cut)
    check(device.get(x), expected(comm, size, torch.float32, "sum"))
    comm.close_arena(arena)


@pytest.mark.parametrize("into_dtype", [torch.float32, torch.bfloat16])
def test_a_sum_of_doubles_converted_once(comm: Communicator, device: StandIn, into_dtype: torch.dtype) -> None:
    size = 5001
    arena = opened(comm, 2 * aligned(8 * size))
    x, into = arena.allocate(size, torch.float64, GPU), arena.allocate(size, into_dtype, GPU)
    given = [torch.randn(size, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(4)]
    device.put(x, given[comm.rank])
    comm.start_all_reduce_into(into, x).wait()
    total = sum(given[1 : comm.size], given[0])
    assert torch.equal(device.get(into), total.to(into_dtype))
    comm.close_arena(arena)


def test_doubles_from_outside_the_arena(comm: Communicator, device: StandIn) -> None:
    arena = opened(comm, 1 << 16)
    x, into = device.array(5000, torch.float64), device.array(5000, torch.float32)
    device.put(x, draw(5000, comm.rank, torch.float64))
    comm.start_all_reduce_into(into, x).wait()
    check(device.get(into), expected(comm, 5000, torch.float64, "sum"))
    comm.close_arena(arena)


def test_many_under_way_and_used_again(comm: Communicator, device: StandIn, way: str) -> None:
    """Events and slots are taken in turn, whichever rank is ahead; what is outside the arena takes the same way."""
    arena = opened(comm, 1 << 20)
    arrays = [arena.allocate(5000, torch.float32, GPU), device.array(9000, torch.float32)]
    arrays += [arena.allocate(7, torch.float32, GPU)]
    for i in range(6):
        for x in arrays:
            device.put(x, torch.full((len(x),), float(comm.rank + i)))
        if comm.rank == i % comm.size:
            sum(range(200_000))  # this one comes late
        for work in [comm.start_all_reduce(x) for x in arrays]:
            work.wait()
    for x in arrays:
        assert (device.get(x) == comm.size * (comm.size - 1) / 2 + comm.size * 5).all()
    comm.close_arena(arena)


def test_a_closed_arena_is_memory_like_any_other(comm: Communicator, device: StandIn) -> None:
    arena = opened(comm, 1 << 16)
    x = arena.allocate(1000, torch.float32, GPU)
    comm.close_arena(arena)
    device.put(x, torch.ones(1000))
    comm.all_reduce(x)
    assert (device.get(x) == comm.size).all()
    del arena, x  # now its memory is freed, which nobody has open


def test_arrays_at_different_places_are_an_error(comm: Communicator, device: StandIn, way: str) -> None:
    lone = comm.duplicate("lone")
    arena = opened(lone, 1 << 20)
    x, y = (arena.allocate(50_000, torch.float32, GPU) for _ in range(2))
    if way == "slots":  # takes them from anywhere
        lone.all_reduce(y if lone.rank == 0 else x)
    else:
        with pytest.raises(MessageError, match="lies elsewhere"):
            lone.all_reduce(y if lone.rank == 0 else x)


@pytest.mark.parametrize("size", [10, 50_000])
def test_arrays_of_the_host_and_of_gpus_together_are_an_error(
    comm: Communicator, device: StandIn, way: str, size: int
) -> None:
    lone = comm.duplicate("lone")
    arena = opened(lone, 1 << 20)
    x = arena.allocate(size, torch.float32, GPU)
    with pytest.raises(MessageError, match="this rank's is not: give all on GPUs, or none"):
        lone.all_reduce(torch.ones(size) if lone.rank == 0 else x)


def test_ranks_that_take_different_ones_of_their_gpus_are_an_error(
    comm: Communicator, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several GPUs of a process each has slots of its own."""
    gpus = [Gpu(device), Gpu(device)]
    monkeypatch.setattr(devices, "gpu_on", lambda where: gpus[where.index])
    lone = comm.duplicate("lone")
    first, second = opened(lone, 4096), lone.open_arena(4096, torch.device("cuda", 1))
    assert isinstance(second, DeviceArena)

    def gpu_of(x: object) -> Gpu | None:
        return gpus[second.offset(x.data_ptr(), 1) is not None] if isinstance(x, Tensor) and device.holds(x) else None

    monkeypatch.setattr(devices, "gpu_of", gpu_of)
    on_first, on_second = (arena.allocate(10, torch.float32, GPU) for arena in (first, second))
    for x in (on_first, on_second):
        device.put(x, torch.ones(10))
        lone.all_reduce(x)
        assert (device.get(x) == lone.size).all()
    with pytest.raises(MessageError, match="lies elsewhere"):
        lone.all_reduce(on_second if lone.rank == 0 else on_first)


MIXED: dict[str, Callable[[Communicator, Tensor], object]] = {
    "all_reduce": lambda comm, x: comm.all_reduce(x),
    "reduce_scatter": lambda comm, x: comm.reduce_scatter(x),
    "all_gather": lambda comm, x: comm.all_gather(x),
    "broadcast": lambda comm, x: comm.broadcast(x),
}


@pytest.mark.parametrize("where", ["in an arena", "elsewhere"])
@pytest.mark.parametrize("what", MIXED)
def test_every_collective_wants_all_arrays_on_gpus_or_none(
    comm: Communicator, device: StandIn, what: str, where: str
) -> None:
    lone = comm.duplicate("lone")
    arena = opened(lone, 1 << 20)
    x = arena.allocate(1000, torch.float32, GPU) if where == "in an arena" else device.array(1000, torch.float32)
    message = "is in the host's memory, this rank's is not" if lone.rank else "is on a GPU, this rank's is not"
    with pytest.raises(MessageError, match=message):
        MIXED[what](lone, x if lone.rank else torch.ones(1000))


def test_a_sum_is_not_converted_into_memory_of_another_device(comm: Communicator, device: StandIn) -> None:
    with pytest.raises(MessageError, match="two arrays on one GPU, or none on one"):
        comm.start_all_reduce_into(torch.ones(100), device.array(100, torch.float64))


def test_any_sequence_of_operations(comm: Communicator, device: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, through slots and staged, on overlapping parts of one array and on others, without a pause between."""
    monkeypatch.setattr(arena_module, "SLOT_BYTES", 4 << 10)
    monkeypatch.setattr(collectives, "THROUGH_SLOTS_BYTES", 2 << 10)
    arena = comm.open_arena(8 << 10, GPU)
    inside = device.array(2000, torch.float32) if isinstance(arena, str) else arena.allocate(2000, torch.float32, GPU)
    arrays = [inside, device.array(2000, torch.float32)]
    whats = ["sum", "max", "gather", "ring", "broadcast"]

    @settings(max_examples=20)
    @given(st.lists(st.tuples(st.sampled_from(whats), st.integers(0, 1), st.integers(0, 1999), st.integers(1, 2000))))
    def run(plan: list[tuple[str, int, int, int]]) -> None:
        wanted = torch.stack([torch.stack([draw(2000 + i, r, torch.float64)[:2000] for i in (0, 1)]) for r in range(n)])
        for i, x in enumerate(arrays):
            device.put(x, wanted[comm.rank, i])
        for what, i, start, size in plan[:5]:
            x, reference = arrays[i][start : start + size], wanted[:, i, start : start + size]
            if what == "broadcast":
                comm.broadcast(x, n - 1)
                reference[:] = reference[n - 1].clone()
            elif what == "gather":
                comm.all_gather(x)
                for r in range(n):
                    reference[:, comm.chunk(len(x), r)] = reference[r, comm.chunk(len(x), r)].clone()
            elif what == "max":
                comm.all_reduce(x, "max")
                reference[:] = reference.amax(0).clone()
            else:
                comm.all_reduce(x, algorithm="ring" if what == "ring" else "auto")
                reference[:] = reference.sum(0).clone()
        for i, x in enumerate(arrays):
            check(device.get(x), wanted[comm.rank, i])

    n = comm.size
    run()
    if not isinstance(arena, str):
        comm.close_arena(arena)
