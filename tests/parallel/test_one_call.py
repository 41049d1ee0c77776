"""Sums in one compiled call: the bits of the plain way, whoever comes late, whatever else is under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mpipar.comm import Communicator, shared
from mpipar.comm import operations as operations_module
from mpipar.comm.arena import Arena
from mpipar.comm.one_call import is_built
from mpipar.errors import MessageError

DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64]
SIZES = [0, 1, 3, 1000, 8192, 70_001, 400_003]  # up to several slots
LARGE = 400_003
PLANNERS = ["can_sum_through_slots", "plan_sum_in_place"]

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
        comm.all_reduce(plain, algorithm="shared")  # what it has prepared is kept
    for turn in range(4):
        plain.copy_(draw(comm, size, dtype, turn))
        x.copy_(draw(comm, size, dtype, turn))
        comm.all_reduce(plain, algorithm="shared")
        comm.all_reduce(x, algorithm="shared")
        assert torch.equal(x, plain)


@pytest.mark.parametrize("size", [5, LARGE])
def test_one_rank_the_compiled_way_and_one_the_plain_way(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, allocate: Allocate, size: int
) -> None:
    """They meet at the same flags, and use the same slots."""
    x = allocate(size, torch.float32)
    with monkeypatch.context() as patch:
        for planner in PLANNERS if comm.rank == 0 else ():
            patch.setattr(operations_module, planner, lambda *_: None)
        comm.all_reduce(x, algorithm="shared")
    for turn in range(50 if size == 5 else 10):
        x.fill_(comm.rank + turn)
        comm.all_reduce(x, algorithm="shared")
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


@pytest.mark.parametrize("size", [20_000, LARGE])
def test_a_rank_that_stays_away_between_the_meetings(comm: Communicator, allocate: Allocate, size: int) -> None:
    """A rank is descheduled anywhere: others are then found waiting at the first meeting, or at the second."""
    x = allocate(size, torch.float64)
    for turn in range(300 if size < LARGE else 50):
        x.fill_(comm.rank + turn)
        if (turn + comm.rank) % 7 == 0:
            time.sleep(0.0005 * (turn % 3))
        comm.all_reduce(x)
        assert (x == comm.size * (comm.size - 1) / 2 + comm.size * turn).all()


def test_large_sums_that_are_moved_by_polls(comm: Communicator) -> None:
    """Started, they go on a block at a time, whenever a rank looks at anything; they keep their order."""
    arrays = [torch.zeros(LARGE, dtype=torch.float64), torch.zeros(LARGE), torch.zeros(3)]
    for turn in range(10):
        for array in arrays:
            array.fill_(comm.rank + turn)
        works = [comm.start_all_reduce(array) for array in arrays]
        while not all(work.done for work in works):
            comm.progress.poll()
            if (turn + comm.rank) % 3 == 0:
                time.sleep(0.0002)
        for array in arrays:
            assert (array == comm.size * (comm.size - 1) / 2 + comm.size * turn).all()


def test_the_same_array_started_again_before_it_is_done(comm: Communicator) -> None:
    """Both are one prepared sum: the second begins when the first is through."""
    x = torch.ones(LARGE)
    for work in [comm.start_all_reduce(x) for _ in range(3)]:
        work.wait()
    assert (x == comm.size**3).all()


@pytest.mark.parametrize("blocking", [True, False])
def test_strides_on_some_ranks_alone(comm: Communicator, blocking: bool) -> None:
    """A copy stands in for the array there, and all ranks still choose the same algorithm."""
    columns = torch.zeros(1000, 401 if comm.rank == 0 else 400, dtype=torch.float64)[:, :400]
    assert columns.is_contiguous() == (comm.rank != 0)
    for turn in range(3):
        columns.fill_(comm.rank + turn)
        if blocking:
            comm.all_reduce(columns)
        else:
            comm.start_all_reduce(columns).wait()
        assert (columns == comm.size * (comm.size - 1) / 2 + comm.size * turn).all()


def test_other_threads_run_while_a_large_sum_is_waited_for(comm: Communicator) -> None:
    """The interpreter is free: another thread can even be the one that lets the others come."""
    x = torch.ones(LARGE)
    comm.all_reduce(x)
    counted = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    comm.barrier()
    if comm.rank == comm.size - 1:
        time.sleep(0.2)
    comm.all_reduce(x)
    stop.set()
    thread.join()
    assert counted > 20
    assert (x == comm.size**2).all()
