"""Sums in one compiled call: the bits of the plain way, whoever comes late, whatever else is under way."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from mpipar.comm import Communicator, shared
from mpipar.comm import one_call as one_call_module
from mpipar.comm import operations as operations_module
from mpipar.comm.arena import Arena
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.host import SLOT_BYTES
from mpipar.comm.one_call import SumInPlace, SumThroughSlots, can_sum_through_slots, is_built
from mpipar.comm.pending import Pending
from mpipar.comm.select import AllReduce
from mpipar.comm.sums import Step, run
from mpipar.errors import MessageError

DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64]
LARGE = 400_003  # several slots, and more than is summed in one call in place
SIZES = [0, 1, 3, 1000, 8192, 70_001, LARGE]
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
        assert importlib.util.find_spec("mpipar.comm._meeting") is None, (
            "meeting.c was built from an older one: run make"
        )
        pytest.skip("meeting.c was not built: no C compiler, or no headers of Python")


def skip_plain(allocate: Allocate, size: int) -> None:
    if allocate is not elsewhere and size >= LARGE:
        pytest.skip("above 1 MiB sums in place are not one call")


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
    skip_plain(allocate, size)
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
    skip_plain(allocate, size)
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


@pytest.mark.parametrize("size", [4, LARGE])
def test_a_call_of_something_else(comm: Communicator, size: int) -> None:
    lone = comm.duplicate("lone")
    x, y = torch.zeros(size), torch.zeros(size + 1)
    for array in (x, y):
        lone.all_reduce(array)  # from here on compiled
    with pytest.raises(MessageError, match=r"called all_reduce\(sum\) of [\d,]+ float32, this rank"):
        lone.all_reduce(y if lone.rank == 0 else x)
    with pytest.raises(MessageError, match="out of step"):
        lone.all_reduce(x)


@pytest.mark.parametrize("other", ["ring", "mpi"])
def test_another_algorithm_on_some_rank(comm: Communicator, other: AllReduce) -> None:
    """One adds up slots, the other sends messages."""
    lone = comm.duplicate("lone")
    x = torch.zeros(LARGE)
    with pytest.raises(MessageError, match="another algorithm"):
        lone.all_reduce(x, algorithm=other if lone.rank == 0 else "auto")


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


def test_a_rank_that_is_late_at_the_next_call(comm: Communicator, allocate: Allocate) -> None:
    """A rank is descheduled anywhere: others are then found waiting at the first meeting, or at the second."""
    x = allocate(20_000, torch.float64)
    for turn in range(300):
        x.fill_(comm.rank + turn)
        if (turn + comm.rank) % 7 == 0:
            time.sleep(0.0005 * (turn % 3))
        comm.all_reduce(x)
        assert (x == comm.size * (comm.size - 1) / 2 + comm.size * turn).all()


def test_a_rank_that_is_late_at_meetings_within(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others give up looking, wait in Python, and go on from that block. One goes the plain way, and dawdles."""
    x = torch.zeros(LARGE, dtype=torch.float64)
    if comm.rank == 0:
        steps_taken = itertools.count()

        def dawdle(steps: list[Step]) -> None:
            if next(steps_taken) % 4 == 1:
                time.sleep(0.003)
            run(steps)

        monkeypatch.setattr(shared, "run", dawdle)
        monkeypatch.setattr(operations_module, "can_sum_through_slots", lambda *_: False)
    for turn in range(10):
        x.fill_(comm.rank + turn)
        if turn % 2:
            comm.all_reduce(x, algorithm="shared")
        else:
            comm.start_all_reduce(x, algorithm="shared").wait()
        assert (x == comm.size * (comm.size - 1) / 2 + comm.size * turn).all()


def test_large_sums_that_are_moved_by_polls(comm: Communicator) -> None:
    """Started, they go on whenever a rank looks at anything; they keep their order."""
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


@pytest.mark.parametrize("blocking", [True, False])
def test_more_blocks_than_are_done_in_one_go(comm: Communicator, blocking: bool) -> None:
    """It goes back to Python now and then, also between the two meetings of a block, and goes on from there."""
    x = torch.zeros(70 * SLOT_BYTES // 4 + 77)
    ramp = torch.arange(len(x), dtype=torch.float32) % 1000
    for turn in range(3):
        x.copy_(ramp).add_(comm.rank + turn)
        if blocking:
            comm.all_reduce(x)
        else:
            comm.start_all_reduce(x).wait()
        assert torch.equal(x, ramp * comm.size + comm.size * (comm.size - 1) / 2 + comm.size * turn)


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


def test_other_threads_run_meanwhile(comm: Communicator) -> None:
    """Also within the compiled call: nobody here gives the interpreter to another thread but who has to."""
    x = torch.ones(2 << 20)
    one_call = comm._operations.all_reduce(x, "sum", "auto").one_call
    assert isinstance(one_call, SumThroughSlots)
    counted, stop = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0.0001)

    thread = threading.Thread(target=count, daemon=True)
    interval = sys.getswitchinterval()
    during = 0
    sys.setswitchinterval(100)
    try:
        thread.start()
        for _ in range(20):
            comm.barrier()
            before = counted
            done = one_call.at_once()
            during += counted - before
            if not done:
                for pending in one_call.rest():
                    while not pending.through():
                        time.sleep(0)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
    thread.join()
    assert during > 0


def test_which_sums_are_one_call(comm: Communicator) -> None:
    """The others of this file would pass without any."""

    def kind(x: object, op: Op = "sum") -> type:
        return type(comm._operations.all_reduce(x, op, "auto").one_call)

    arena = comm.open_arena(8 << 20)
    assert isinstance(arena, Arena), arena
    for dtype in DTYPES:
        assert kind(torch.zeros(3, dtype=dtype)) is kind(torch.zeros(LARGE, dtype=dtype)) is SumThroughSlots
        assert kind(arena.allocate(100_000, dtype, torch.device("cpu"))) is SumInPlace
    assert kind(np.zeros(LARGE)) is SumThroughSlots
    for other in (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.uint8)):
        assert kind(other) is type(None)
    assert kind(torch.zeros(3), "mean") is kind(torch.zeros(3), "max") is type(None)
    assert kind(torch.zeros(8, 8)[:, :4]) is type(None)  # done at once it would not be written back


def test_where_a_rank_lacks_it_nobody_has_it(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        if comm.rank == comm.size - 1:
            patch.setattr(one_call_module, "is_built", lambda: False)
        lacking = Communicator.world()
    assert lacking.roster.compiled == (True,) * (comm.size - 1) + (False,)
    for size in (3, LARGE):
        x = torch.full((size,), float(comm.rank))
        assert lacking._operations.all_reduce(x, "sum", "auto").one_call is None
        lacking.all_reduce(x)
        assert (x == comm.size * (comm.size - 1) / 2).all()
    lacking.free()


def test_large_arrays_of_many_ranks_are_none(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    host = comm._memory.only_host
    assert host is not None
    monkeypatch.setattr(host, "size", 17)
    few, many = Buffer(torch.zeros(SLOT_BYTES // 4)), Buffer(torch.zeros(SLOT_BYTES // 4 + 1))
    assert can_sum_through_slots(host, few, "sum") and not can_sum_through_slots(host, many, "sum")


@pytest.mark.parametrize("size", [5, LARGE])
def test_an_interrupt(comm: Communicator, size: int) -> None:
    """Who catches it cannot go on as if nothing had happened: the others are in the middle of this sum."""
    lone = comm.duplicate("lone")
    x = torch.zeros(size)
    lone.all_reduce(x)
    one_call = lone._operations.all_reduce(x, "sum", "auto").one_call
    assert isinstance(one_call, SumThroughSlots)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    one_call.at_once = interrupted
    with pytest.raises(KeyboardInterrupt):
        lone.all_reduce(x)
    for again in (lone.all_reduce, lone.start_all_reduce):
        with pytest.raises(
            MessageError, match=r"all_reduce\(sum\) of [\d,]+ float32 #\d+ on axis 'lone' was interrupted"
        ):
            again(x)


def test_an_interrupt_of_one_that_begins(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    lone = comm.duplicate("lone")
    x = torch.zeros(3)
    lone.all_reduce(x)
    one_call = lone._operations.all_reduce(x, "sum", "auto").one_call
    assert isinstance(one_call, SumThroughSlots)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(one_call, "_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lone.start_all_reduce(x)
    with pytest.raises(MessageError, match="was interrupted"):
        lone.all_reduce(x)


def test_an_interrupt_later_on(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the waits of a sum that was begun at once. What is behind it ends too, and does not take its slots."""
    lone = comm.duplicate("lone")
    x, y = torch.zeros(LARGE), torch.zeros(LARGE)
    for array in (x, y):
        lone.all_reduce(array)
    one_call = lone._operations.all_reduce(x, "sum", "auto").one_call
    assert isinstance(one_call, SumThroughSlots)

    def interrupted() -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(one_call, "_begin", lambda: False)  # as if nobody had come yet; and so nobody does
    monkeypatch.setattr(SumThroughSlots, "_arrivals", lambda _: [Late()])
    monkeypatch.setattr(one_call, "_poll", interrupted)
    first, second = lone.start_all_reduce(x), lone.start_all_reduce(y)
    with pytest.raises(KeyboardInterrupt):
        first.wait()
    with pytest.raises(MessageError, match=r"out of step.* was interrupted"):
        lone.all_reduce(y)
    with pytest.raises(MessageError, match=r"out of step.* was interrupted"):
        second.wait()
    with pytest.raises(MessageError, match="was interrupted"):
        first.wait()


class Late(Pending):
    """It comes at the second look."""

    def __init__(self) -> None:
        self._looks = 0

    def through(self) -> bool:
        self._looks += 1
        return self._looks > 1


@pytest.mark.parametrize("size", [5, LARGE])
def test_elements_that_are_not_aligned(comm: Communicator, size: int) -> None:
    x = np.frombuffer(bytearray(4 * size + 1), np.float32, offset=1)
    assert not x.flags.aligned and not Buffer(x).is_in_place and Buffer(x).values.flags.aligned
    x[:] = comm.rank
    comm.all_reduce(x)
    assert (x == comm.size * (comm.size - 1) / 2).all()
