"""Arrays on a GPU that is none (`tests.stand_in`): the same sums as float64, and no missing wait."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mpipar.comm import Communicator
from mpipar.comm.buffers import Op
from mpipar.comm.device import arena as arena_module
from mpipar.comm.device import collectives, devices
from mpipar.comm.device.arena import DeviceArena, aligned
from mpipar.comm.device.gpu import Gpu
from tests.stand_in.board import BOARD_BYTES, Board
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
    before, waits = comm.bytes_sent, device.waits_on_host
    arrays = [arena.allocate(size, dtype, GPU) for size in SIZES]
    for x in arrays:
        for _ in range(2):
            device.put(x, draw(len(x), comm.rank, dtype))
            comm.all_reduce(x, op)
    assert comm.bytes_sent == before and device.waits_on_host == waits, "nothing was sent, and no host waited"
    for x in arrays:
        check(device.get(x), expected(comm, len(x), dtype, op), op)
    comm.close_arena(arena)
