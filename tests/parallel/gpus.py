"""A GPU that is none (`tests.stand_in`), for tests of what ranks do on GPUs; fixtures are named in conftest.py."""

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
from mpipar.comm.device.arena import DeviceArena
from mpipar.comm.device.gpu import Gpu
from mpipar.comm.host import Host
from tests.stand_in.board import BOARD_BYTES, Board
from tests.stand_in.meetings import telling
from tests.stand_in.runtime import StandIn

GPU = torch.device("cuda", 0)


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


@pytest.fixture
def careful(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Communicator:
    """In a job that was started to survive deaths."""
    monkeypatch.setattr("mpipar.comm.communicator.can_survive", lambda: True)
    return comm.duplicate("careful")


@pytest.fixture(params=["slots", "in place"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Arrays pass through slots that are far smaller than they are, or are reduced where they lie."""
    monkeypatch.setattr(collectives, "THROUGH_SLOTS_BYTES", 1 << 30 if request.param == "slots" else 0)
    monkeypatch.setattr(arena_module, "SLOT_BYTES", 16 << 10)
    return str(request.param)


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
