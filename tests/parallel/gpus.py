"""A GPU that is none (`tests.stand_in`), for tests of what ranks do on GPUs; fixtures are named in conftest.py."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mpipar.comm import Communicator
from mpipar.comm.device import arena as arena_module
from mpipar.comm.device import collectives, devices
from mpipar.comm.device import views as views_module
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


@pytest.fixture
def views(comm: Communicator, device: StandIn, monkeypatch: pytest.MonkeyPatch) -> Communicator:
    """All ranks, with such an MPI. To the one that there is the stand-in's memory is the host's."""
    monkeypatch.setattr(views_module, "as_message", torch.Tensor.numpy)
    with_views = Communicator(comm.mpi.Dup(), "views", comm.progress, replace(comm.roster, transport="mpi"))
    monkeypatch.setattr(device.pinned_memory, "allocate", lambda num_bytes: pytest.fail("memory of the host is used"))
    return with_views


@pytest.fixture(params=["staged", "views"])
def carried(request: pytest.FixtureRequest, comm: Communicator, device: StandIn) -> Communicator:
    """All ranks. What is on the GPU goes through pinned memory, or is handed to an MPI that takes pointers to it."""
    found: Communicator = request.getfixturevalue("views") if request.param == "views" else comm
    return found


def opened(comm: Communicator, num_bytes: int) -> DeviceArena:
    if comm.size == 1:
        pytest.skip("one rank has nobody to share with")
    arena = comm.open_arena(num_bytes, GPU)
    assert isinstance(arena, DeviceArena), arena
    return arena
