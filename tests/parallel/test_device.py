"""Arrays on a GPU that is none (`tests.stand_in`): the same sums as float64, and no missing wait."""

from __future__ import annotations

import gc
import math
import mmap
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpipar.comm import Communicator, exact
from mpipar.comm.buffers import Op
from mpipar.comm.device import arena as arena_module
from mpipar.comm.device import collectives, devices
from mpipar.comm.device.arena import DeviceArena, aligned
from mpipar.comm.device.gpu import Gpu
from mpipar.comm.failure import part
from mpipar.comm.host import Host
from mpipar.comm.mpi import MPI
from mpipar.comm.pending import Pending
from mpipar.errors import ConfigError, MessageError, StallError
from mpipar.parallel.ledger import CpuLedger, GpuLedger
from tests.stand_in.board import BOARD_BYTES, Board, Misuse
from tests.stand_in.meetings import telling
from tests.stand_in.runtime import StandIn

GPU = torch.device("cuda", 0)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8]
SIZES = [1, 3, 127, 128, 4099, 20_001]


@pytest.fixture
def device(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The GPU that all ranks share. What was wrong on it fails the test."""
    descriptor = comm.share_file(BOARD_BYTES)
    assert isinstance(descriptor, int)
    stand_in = StandIn(Board(mmap.mmap(descriptor, BOARD_BYTES), comm.rank))
    gpu = Gpu(stand_in)
    monkeypatch.setattr(devices, "gpu_of", lambda x: gpu if stand_in.holds(x) else None)
    monkeypatch.setattr(devices, "gpu_on", lambda device: gpu if device.type == "cuda" else None)
    monkeypatch.setattr(Host, "meet", telling(Host.meet, stand_in.known))
    yield stand_in
    stand_in.end()
    os.close(descriptor)


def opened(comm: Communicator, num_bytes: int) -> DeviceArena:
    if comm.size == 1:
        pytest.skip("one rank has nobody to share with")
    arena = comm.open_arena(num_bytes, GPU)
    assert isinstance(arena, DeviceArena), arena
    return arena


def draw(size: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, whose sums every dtype holds exactly."""
    return torch.randint(0, 6, (size,), generator=torch.Generator().manual_seed(1000 * rank + size)).to(dtype)


def expected(comm: Communicator, size: int, dtype: torch.dtype, op: Op) -> Tensor:
    given = torch.stack([draw(size, rank, dtype).double() for rank in range(comm.size)])
    return {"sum": given.sum(0), "mean": given.mean(0), "max": given.amax(0)}[op]


def check(found: Tensor, wanted: Tensor, op: Op = "sum") -> None:
    tolerance = torch.finfo(found.dtype).eps if op == "mean" else 0.0
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=0)


@pytest.fixture(params=["slots", "in place"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Arrays pass through slots that are far smaller than they are, or are reduced where they lie."""
    monkeypatch.setattr(collectives, "THROUGH_SLOTS_BYTES", 1 << 30 if request.param == "slots" else 0)
    monkeypatch.setattr(arena_module, "SLOT_BYTES", 16 << 10)
    return str(request.param)


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


@pytest.fixture
def careful(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Communicator:
    """In a job that was started to survive deaths."""
    monkeypatch.setattr("mpipar.comm.communicator.can_survive", lambda: True)
    return comm.duplicate("careful")


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


# Through the memory of the host: without an arena


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


def test_staged_broadcast(comm: Communicator, device: StandIn) -> None:
    x = device.array(600_000, torch.float32)
    for root in range(comm.size):
        device.put(x, torch.full((len(x),), float(comm.rank)))
        comm.broadcast(x, root)
        assert (device.get(x) == root).all()


def test_staged_doubles_converted(comm: Communicator, device: StandIn) -> None:
    x, into = device.array(5000, torch.float64), device.array(5000, torch.float32)
    device.put(x, draw(5000, comm.rank, torch.float64))
    comm.start_all_reduce_into(into, x).wait()
    check(device.get(into), expected(comm, 5000, torch.float64, "sum"))


def test_staged_messages_between_two(comm: Communicator, device: StandIn) -> None:
    """Round the ring; what is received is not brought down first, and what is sent is not sent before it was made."""
    out, into = device.array(400_000, torch.float32), device.array(400_000, torch.float32)
    device.put(out, draw(len(out), comm.rank, torch.float32))
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    works = [comm.start_send(out, right), comm.start_receive(into, left)]
    for work in works:
        work.wait()
    check(device.get(into), draw(len(out), left, torch.float32).double())


def test_staged_all_to_all(comm: Communicator, device: StandIn) -> None:
    n = comm.size
    out, into = device.array(n * 1000, torch.float32), device.array(n * 1000, torch.float32)
    device.put(out, torch.arange(n).repeat_interleave(1000) * 10.0 + comm.rank)
    comm.all_to_all(out, into)
    assert torch.equal(device.get(into), torch.arange(n).repeat_interleave(1000) + 10.0 * comm.rank)


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


# The stand-in itself


def test_misuse_is_seen(comm: Communicator, device: StandIn) -> None:
    stream = device.stream()
    x = device.array(10, torch.float32)
    device.put(x, torch.ones(10))
    with pytest.raises(Misuse, match="missing wait"):
        device.zero(x.data_ptr(), 40, stream)
    address = device.allocate(100)
    device.free(address)
    with pytest.raises(Misuse, match="freed twice"):
        device.free(address)
    with pytest.raises(Misuse, match="closed twice"):
        device.close_memory(address)
    with pytest.raises(Misuse, match="not the device's"):
        device.zero(address, 100, stream)
    event = device.event()
    with pytest.raises(Misuse, match="never recorded"):
        device.wait(stream, event)
    device.destroy_event(event)
    with pytest.raises(Misuse, match="after it was destroyed"):
        device.record(event, stream)


# Exact sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_contributions_have_the_bits_of_the_cpu(device: StandIn, dtype: torch.dtype) -> None:
    size, step = 1000, exact.spacing(3, 4)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(size, generator=generator).to(dtype) for _ in range(5)]
    given[3][7] = math.inf
    total, x = device.array(size, torch.float64), device.array(size, dtype)
    on_gpu, on_cpu = GpuLedger(["a", "b"], torch.device("cpu")), CpuLedger()
    device.magnitudes(on_gpu)
    wanted = torch.full((size,), math.nan, dtype=torch.float64)
    for i, values in enumerate(given):
        device.put(x, values)
        on_gpu.add("b", total, x, step)
        on_cpu.add("b", wanted, values, step)
        device.finish()
        limits = {"a": 1.0, "b": exact.limit(3)}
        assert on_gpu.take_fault(limits) == on_cpu.take_fault(limits) == (i == 3)
        assert on_gpu.largest() == on_cpu.largest()
        assert torch.equal(device.get(total).view(torch.int64), wanted.view(torch.int64))
    assert on_gpu.has("b") and not on_gpu.has("a")


def test_a_nan_is_the_largest(device: StandIn) -> None:
    total, x = device.array(3, torch.float64), device.array(3, torch.float32)
    ledger = GpuLedger(["a"], torch.device("cpu"))
    device.magnitudes(ledger)
    for values in ([1.0, -math.nan, 2.0], [math.inf, 0.0, 0.0]):
        device.put(x, torch.tensor(values))
        ledger.add("a", total, x, 2.0**-20)
    device.finish()
    assert math.isnan(ledger.largest()["a"]) and not ledger.take_fault({"a": 1e30})
    ledger.clear()
    assert ledger.largest() == {}


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


def test_doubles_from_outside_the_arena(comm: Communicator, device: StandIn) -> None:
    arena = opened(comm, 1 << 16)
    x, into = device.array(5000, torch.float64), device.array(5000, torch.float32)
    device.put(x, draw(5000, comm.rank, torch.float64))
    comm.start_all_reduce_into(into, x).wait()
    check(device.get(into), expected(comm, 5000, torch.float64, "sum"))
    comm.close_arena(arena)


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
