"""The collectives on a GPU, against float64: in the arena, through slots, staged; and the exact kernels."""

from __future__ import annotations

import math

import pytest
import torch

from mpipar.comm import Communicator, exact
from mpipar.comm.buffers import Op
from mpipar.comm.device import collectives
from mpipar.comm.device.arena import DeviceArena, aligned
from mpipar.parallel.ledger import CpuLedger, GpuLedger
from tests.sums import check, draw, expected

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]
SIZES = [1, 3, 127, 4099, 1_000_003]


def opened(comm: Communicator, num_bytes: int, device: torch.device) -> DeviceArena:
    if comm.size == 1:
        pytest.skip("one rank has nobody to share with")
    arena = comm.open_arena(num_bytes, device)
    assert isinstance(arena, DeviceArena), arena
    return arena


@pytest.mark.parametrize("way", ["in place", "slots"])
@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce(
    comm: Communicator, device: torch.device, dtype: torch.dtype, op: Op, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if op == "mean" and not dtype.is_floating_point:
        return
    monkeypatch.setattr(collectives, "THROUGH_SLOTS_BYTES", 0 if way == "in place" else 1 << 40)
    arena = opened(comm, sum(aligned(size * dtype.itemsize) for size in SIZES), device)
    arrays = [arena.allocate(size, dtype, device) for size in SIZES]
    for _ in range(3):
        for x in arrays:
            x.copy_(draw(len(x), comm.rank, dtype))
            comm.all_reduce(x, op)
    for x in arrays:
        check(x, expected(comm, len(x), dtype, op), op)
    comm.close_arena(arena)


def test_a_part_that_begins_anywhere(comm: Communicator, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "THROUGH_SLOTS_BYTES", 0)
    arena = opened(comm, 1 << 20, device)
    x = arena.allocate(100_000, torch.bfloat16, device)
    for start, stop in [(1, 10), (103, 93_577), (8, 16)]:
        x.fill_(comm.rank)
        comm.all_reduce(x[start:stop])
        assert (x[start:stop] == comm.size * (comm.size - 1) / 2).all()
        assert (x[:start] == comm.rank).all() and (x[stop:] == comm.rank).all()
    comm.close_arena(arena)


def test_infinity_and_nan(comm: Communicator, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "THROUGH_SLOTS_BYTES", 0)
    arena = opened(comm, 1 << 16, device)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = arena.allocate(4, dtype, device)
        x.copy_(torch.tensor([torch.finfo(dtype).max, math.inf, math.nan, 1.0]))
        comm.all_reduce(x)
        found = x.tolist()
        assert math.isinf(found[0]) and math.isinf(found[1]) and math.isnan(found[2]) and found[3] == comm.size
    comm.close_arena(arena)


def test_on_streams_of_the_caller(comm: Communicator, device: torch.device) -> None:
    """The operation follows the stream that is current, and the stream follows it, with much before and behind."""
    arena = opened(comm, 1 << 24, device)
    x = arena.allocate(1 << 20, torch.float32, device)
    side = torch.cuda.Stream()
    work = torch.randn(2048, 2048, device=device)
    side.wait_stream(torch.cuda.current_stream())
    for i in range(20):
        with torch.cuda.stream(side):
            for _ in range(5):
                work = torch.tanh(work @ work)  # keeps the stream busy
            x.fill_(comm.rank + i)
            comm.all_reduce(x)
            total = x.double().sum() / len(x)
        assert total.item() == comm.size * (comm.size - 1) / 2 + comm.size * i
    comm.close_arena(arena)


def test_shards(comm: Communicator, device: torch.device) -> None:
    arena = opened(comm, 1 << 23, device)
    for x in (arena.allocate(1_000_003, torch.float32, device), torch.empty(1_000_003, device=device)):
        x.copy_(draw(len(x), comm.rank, torch.float32))
        comm.reduce_scatter(x)
        comm.all_gather(x)
        check(x, expected(comm, len(x), torch.float32, "sum"))
    comm.close_arena(arena)


@pytest.mark.parametrize("into_dtype", [torch.float32, torch.bfloat16])
def test_doubles_converted_once(comm: Communicator, device: torch.device, into_dtype: torch.dtype) -> None:
    size = 100_001
    arena = opened(comm, 2 * aligned(8 * size), device)
    x, into = arena.allocate(size, torch.float64, device), arena.allocate(size, into_dtype, device)
    given = [
        torch.randn(size, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(comm.size)
    ]
    x.copy_(given[comm.rank])
    comm.start_all_reduce_into(into, x).wait()
    assert torch.equal(into.cpu(), sum(given[1:], given[0]).to(into_dtype))
    comm.close_arena(arena)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_staged(comm: Communicator, device: torch.device, dtype: torch.dtype) -> None:
    """All that goes through the memory of the host, one after the other, on one array."""
    for size in (1, 4099, 3_000_001):
        x = draw(size, comm.rank, dtype).to(device)
        comm.all_reduce(x, algorithm="ring")
        check(x, expected(comm, size, dtype, "sum"))
        into = torch.empty_like(x)
        works = [
            comm.start_send(x, (comm.rank + 1) % comm.size),
            comm.start_receive(into, (comm.rank - 1) % comm.size),
        ]
        for work in works:
            work.wait()
        assert torch.equal(into, x)
        x.fill_(comm.rank)
        comm.broadcast(x, comm.size - 1)
        assert (x == comm.size - 1).all()
    out = (torch.arange(comm.size).repeat_interleave(1000) * 10 + comm.rank).to(device, dtype)
    into = torch.empty_like(out)
    comm.all_to_all(out, into)
    assert into.tolist() == (torch.arange(comm.size).repeat_interleave(1000) + 10 * comm.rank).to(dtype).tolist()


def test_what_is_not_contiguous(comm: Communicator, device: torch.device) -> None:
    x = torch.full((300, 200), float(comm.rank), device=device)[::2, ::3]
    comm.all_reduce(x)
    assert (x == comm.size * (comm.size - 1) / 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_contributions_have_the_bits_of_the_cpu(device: torch.device, dtype: torch.dtype) -> None:
    size, step = 100_003, exact.spacing(3, 4)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(size, generator=generator).to(dtype) for _ in range(5)]
    given[3][7], given[4][9] = math.inf, math.nan
    total = torch.empty(size, dtype=torch.float64, device=device)
    wanted = torch.empty(size, dtype=torch.float64)
    on_gpu, on_cpu = GpuLedger(["a", "b"], device), CpuLedger()
    for i, values in enumerate(given):
        on_gpu.add("b", total, values.to(device), step)
        on_cpu.add("b", wanted, values, step)
        limits = {"a": 1.0, "b": exact.limit(3)}
        assert on_gpu.take_fault(limits) == on_cpu.take_fault(limits) == (i >= 3)
        assert str(on_gpu.largest()) == str(on_cpu.largest())
        assert torch.equal(total.cpu().nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_cupy_arrays(comm: Communicator, device: torch.device) -> None:
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Device(device.index):
        x = cupy.full(10_000, comm.rank, "float32")
        comm.all_reduce(x)
        assert bool((x == comm.size * (comm.size - 1) / 2).all())


@pytest.mark.parametrize("op", ["sum", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_smallest_numbers_are_not_flushed_to_zero(
    comm: Communicator, device: torch.device, dtype: torch.dtype, op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "THROUGH_SLOTS_BYTES", 0)
    arena = opened(comm, 1 << 16, device)
    x = arena.allocate(1000, dtype, device)
    one = 2.0**-130
    x.fill_(one * (comm.rank + 1))
    comm.all_reduce(x, op)
    wanted = one * (comm.size if op == "max" else comm.size * (comm.size + 1) // 2)
    check(x, torch.full((1000,), wanted, dtype=torch.float64))
