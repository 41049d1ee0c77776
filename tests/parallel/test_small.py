"""Small sums in one compiled call: the bits of the plain way, whoever comes late, whatever else is under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mpipar.comm import Communicator, shared
from mpipar.comm import operations as operations_module
from mpipar.comm.arena import Arena
from mpipar.comm.small import is_built
from mpipar.errors import MessageError

DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64]
SIZES = [0, 1, 3, 1000, 8192, 70_001]
PLANNERS = ["plan_small_sum", "plan_small_sum_in_place"]

Allocate = Callable[[int, torch.dtype], Tensor]


def elsewhere(size: int, dtype: torch.dtype) -> Tensor:
    """Memory of this process."""
    return torch.zeros(size, dtype=dtype)


@pytest.fixture(params=["slots", "arena"])
def allocate(request: pytest.FixtureRequest, comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocate]:
    """What makes arrays: their sum is taken through slots, or in place."""
    if request.param == "slots":
        yield elsewhere
        return
    monkeypatch.setattr(shared, "pays_in_place", lambda *_, **__: True)
    arena = comm.open_arena(8 << 20)
    assert isinstance(arena, Arena), arena
    yield lambda size, dtype: arena.allocate(size, dtype, torch.device("cpu"))


@pytest.fixture(autouse=True)
def needs_it(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank has nobody to meet")
    if not is_built():
        pytest.skip("meeting.c was not built: no C compiler, or no headers of Python")


def draw(comm: Communicator, size: int, dtype: torch.dtype, turn: int) -> Tensor:
    """Numbers whose sum depends on the order of addition, or overflows."""
    generator = torch.Generator().manual_seed(100 * turn + comm.rank)
    if dtype.is_floating_point:
        return torch.randn(size, generator=generator, dtype=dtype)
    return torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max, (size,), generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_bits_of_the_plain_way(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, allocate: Allocate, size: int, dtype: torch.dtype
) -> None:
    x, plain = allocate(size, dtype), allocate(size, dtype)
    with monkeypatch.context() as patch:
        for planner in PLANNERS:
            patch.setattr(operations_module, planner, lambda *_: None)
        comm.all_reduce(plain)  # what it has prepared is kept
    for turn in range(4):
        plain.copy_(draw(comm, size, dtype, turn))
        x.copy_(draw(comm, size, dtype, turn))
        comm.all_reduce(plain)
        comm.all_reduce(x)
        assert torch.equal(x, plain)


def test_one_rank_the_compiled_way_and_one_the_plain_way(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, allocate: Allocate
) -> None:
    """They meet at the same flags, and use the same slots."""
    x = allocate(5, torch.float32)
    with monkeypatch.context() as patch:
        for planner in PLANNERS if comm.rank == 0 else ():
            patch.setattr(operations_module, planner, lambda *_: None)
        comm.all_reduce(x)
    for turn in range(50):
        x.fill_(comm.rank + turn)
        comm.all_reduce(x)
        assert (x == comm.size * (comm.size - 1) / 2 + comm.size * turn).all()


def test_a_rank_that_comes_late(comm: Communicator, allocate: Allocate) -> None:
    x = allocate(7, torch.float64)
    for turn in range(2 * comm.size):
        x.fill_(comm.rank)
        if turn % comm.size == comm.rank:
            time.sleep(0.03)
        comm.all_reduce(x)
        assert (x == comm.size * (comm.size - 1) / 2).all()


def test_behind_what_is_under_way(comm: Communicator, allocate: Allocate) -> None:
    """It waits for its turn in the lane; what is behind it too."""
    x, large, small = (allocate(size, torch.float32) for size in (9, 300_000, 9))
    for turn in range(10):
        for array in (x, large, small):
            array.fill_(comm.rank + turn)
        works = [comm.start_all_reduce(array) for array in (x, large)]
        comm.all_reduce(small)
        comm.barrier()
        for work in works:
            work.wait()
        for array in (x, large, small):
            assert (array == comm.size * (comm.size - 1) / 2 + comm.size * turn).all()


def test_a_call_of_something_else(comm: Communicator) -> None:
    lone = comm.duplicate("lone")
    x, y = torch.zeros(4), torch.zeros(5)
    for array in (x, y):
        lone.all_reduce(array)  # from here on compiled
    with pytest.raises(MessageError, match=r"called all_reduce\(sum\) of [45] float32, this rank"):
        lone.all_reduce(y if lone.rank == 0 else x)
    with pytest.raises(MessageError, match="out of step"):
        lone.all_reduce(x)


def test_a_call_of_something_else_in_place(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    lone = comm.duplicate("lone")
    monkeypatch.setattr(shared, "pays_in_place", lambda *_, **__: True)
    arena = lone.open_arena(1 << 20)
    assert isinstance(arena, Arena), arena
    x, y = (arena.allocate(1000, torch.float32, torch.device("cpu")) for _ in range(2))
    for array in (x, y):
        lone.all_reduce(array)
    with pytest.raises(MessageError, match=r"lies elsewhere"):
        lone.all_reduce(y if lone.rank == 0 else x)


def test_a_rank_that_stays_away_between_the_meetings(comm: Communicator, allocate: Allocate) -> None:
    """A rank is descheduled anywhere: others are then found waiting at the first meeting, or at the second."""
    x = allocate(20_000, torch.float64)
    for turn in range(300):
        x.fill_(comm.rank + turn)
        if (turn + comm.rank) % 7 == 0:
            time.sleep(0.0005 * (turn % 3))
        comm.all_reduce(x)
        assert (x == comm.size * (comm.size - 1) / 2 + comm.size * turn).all()
