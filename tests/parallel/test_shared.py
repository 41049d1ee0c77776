"""The arena: sums in place in shared memory, against float64, and the ring where there can be none."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mpipar.comm import Communicator
from mpipar.comm import segment as segment_module
from mpipar.comm.arena import Arena, arena_bytes
from mpipar.comm.buffers import Buffer, Op
from mpipar.errors import MessageError
from mpipar.train.dealing import open_counter
from tests.sums import draw, expected

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]
SIZES = [0, 1, 2, 3, 7, 4099, 200_001]


def num_descriptors() -> int:
    gc.collect()  # a map that nobody has any more holds one
    return len(os.listdir("/proc/self/fd"))


def opened(comm: Communicator, num_bytes: int) -> Arena:
    if comm.size == 1:
        pytest.skip("one rank has nobody to share with")
    arena = comm.open_arena(num_bytes)
    assert isinstance(arena, Arena), arena
    return arena


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce(comm: Communicator, dtype: torch.dtype, op: Op) -> None:
    if op == "mean" and not dtype.is_floating_point:
        return
    arena = opened(comm, arena_bytes([size * dtype.itemsize for size in SIZES]))
    for size in SIZES:
        x = arena.allocate(size, dtype, CPU)
        before = comm.bytes_sent
        for _ in range(2):
            x.copy_(draw(size, comm.rank, dtype))
            comm.all_reduce(x, op)
            tolerance = torch.finfo(dtype).eps if op == "mean" else 0.0
            torch.testing.assert_close(x.double(), expected(comm, size, dtype, op), rtol=tolerance, atol=0)
        assert comm.bytes_sent == before, "nothing was sent"


def test_the_rows_of_a_column_begin_at_different_places_of_a_page(comm: Communicator) -> None:
    """Else they would meet in one set of a cache, and on one bank of memory."""
    arena = opened(comm, 1 << 20)
    column = arena.column(Buffer(arena.allocate(1000, torch.float32, CPU)))
    assert column is not None
    places = [buffer.address % 4096 for buffer in column]
    assert len(set(places)) == comm.size and all(place % 64 == 0 for place in places)


def test_sums_of_16_bit_floats_are_rounded_once(comm: Communicator) -> None:
    """256 and then ones: each addition alone would be lost in bfloat16."""
    arena = opened(comm, 4096)
    x = arena.allocate(8, torch.bfloat16, CPU)
    x.fill_(256.0 if comm.rank == 0 else 1.0)
    comm.all_reduce(x)
    assert (x == torch.tensor(255.0 + comm.size).bfloat16()).all()


def test_reduce_scatter_then_all_gather(comm: Communicator) -> None:
    arena = opened(comm, arena_bytes([size * 4 for size in SIZES]))
    for size in SIZES:
        x = arena.allocate(size, torch.float32, CPU)
        x.copy_(draw(size, comm.rank, torch.float32))
        comm.reduce_scatter(x)
        wanted = expected(comm, size, torch.float32, "sum").float()
        mine = comm.chunk(size)
        assert torch.equal(x[mine], wanted[mine])
        comm.all_gather(x)
        assert torch.equal(x, wanted)


def test_the_same_bits_on_all_ranks(comm: Communicator) -> None:
    arena = opened(comm, 1 << 20)
    x = arena.allocate(100_001, torch.float32, CPU)
    torch.randn(x.shape, generator=torch.Generator().manual_seed(comm.rank), out=x)
    comm.all_reduce(x)
    assert len({bits.tobytes() for bits in comm.all_gather_object(x.numpy())}) == 1


def test_a_part_of_what_was_allocated(comm: Communicator) -> None:
    """A view is reduced alone; what lies around it is not touched."""
    arena = opened(comm, 1 << 16)
    x = arena.allocate(1000, torch.float32, CPU)
    x.fill_(comm.rank)
    comm.all_reduce(x[100:357])
    total = comm.size * (comm.size - 1) / 2
    assert (x[100:357] == total).all() and (x[:100] == comm.rank).all() and (x[357:] == comm.rank).all()


def test_what_is_not_contiguous_or_not_in_it(comm: Communicator) -> None:
    arena = opened(comm, 1 << 19)
    inside = arena.allocate(64 * 1024, torch.float32, CPU).view(256, 256).t()
    outside = torch.ones(64 * 1024)
    inside.fill_(1.0)
    for x in (inside, outside):
        comm.all_reduce(x)
        assert (x == comm.size).all()


def test_started_together_and_mixed_with_the_ring(comm: Communicator) -> None:
    arena = opened(comm, 1 << 20)
    arrays = [arena.allocate(50_000, torch.float32, CPU), torch.zeros(70_000), arena.allocate(3, torch.float32, CPU)]
    for x in arrays:
        x.fill_(comm.rank + 1)
    works = [comm.start_all_reduce(x) for x in arrays]
    for work in reversed(works):
        work.wait()
    assert all((x == comm.size * (comm.size + 1) / 2).all() for x in arrays)


def test_a_closed_arena_is_memory_like_any_other(comm: Communicator) -> None:
    arena = opened(comm, 1 << 16)
    x = arena.allocate(100, torch.float32, CPU)
    comm.close_arena(arena)
    x.fill_(1.0)
    comm.all_reduce(x)
    assert (x == comm.size).all()


def test_it_is_used_up(comm: Communicator) -> None:
    arena = opened(comm, 8192)
    arena.allocate(1024, torch.float32, CPU)
    with pytest.raises(MemoryError, match="4,096 bytes left where 4,100 are wanted"):
        arena.allocate(1025, torch.float32, CPU)


def test_nothing_is_left_and_no_descriptor_is_kept(comm: Communicator) -> None:
    before, names = num_descriptors(), set(os.listdir("/dev/shm"))
    for _ in range(3):
        comm.close_arena(opened(comm, 1 << 20))
    assert num_descriptors() == before
    assert not {name for name in set(os.listdir("/dev/shm")) - names if "mpipar" in name}


@pytest.mark.parametrize("where", ["_create", "_open"])
def test_where_one_rank_cannot_share_none_does(comm: Communicator, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if comm.size == 1:
        assert comm.open_arena(1 << 16) == "there is one rank"
        return

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "not permitted")

    before = num_descriptors()
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(segment_module, where, refuse)
    reason = comm.open_arena(1 << 16)
    assert isinstance(reason, str) and "not permitted" in reason
    assert num_descriptors() == before
    x = np.ones(100)
    assert (comm.all_reduce(x) == comm.size).all()


def test_a_file_is_the_same_for_all_ranks(comm: Communicator) -> None:
    before = num_descriptors()
    descriptor = comm.share_file(8 * comm.size)
    assert isinstance(descriptor, int)
    assert os.fstat(descriptor).st_size == 8 * comm.size
    assert not any(os.pread(descriptor, 8 * comm.size, 0))
    comm.barrier()
    os.pwrite(descriptor, comm.rank.to_bytes(8, "little"), 8 * comm.rank)
    comm.barrier()
    found = np.frombuffer(os.pread(descriptor, 8 * comm.size, 0), np.uint64)
    assert found.tolist() == list(range(comm.size))
    os.close(descriptor)
    assert num_descriptors() == before


@pytest.mark.parametrize("where", ["_create", "_open"])
@pytest.mark.parametrize("victim", ["first", "last"])
def test_a_file_that_one_rank_cannot_open_none_has(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, where: str, victim: str
) -> None:
    if where == "_create" and victim == "last" and comm.size > 1:
        pytest.skip("only the first rank makes one")

    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "permission denied")

    before = num_descriptors()
    if comm.rank == (0 if victim == "first" else comm.size - 1):
        monkeypatch.setattr(segment_module, where, refuse)
    reason = comm.share_file(16)
    assert isinstance(reason, str) and "permission denied" in reason
    assert num_descriptors() == before
    counter = open_counter(comm)
    assert counter == reason


def test_a_process_of_the_same_number_elsewhere_is_not_taken_for_a_neighbour(tmp_path: Path) -> None:
    """Ranks in containers of their own: the descriptor is some other file's."""
    with (tmp_path / "other").open("w+b") as other:
        other.write(bytes(4096))
        other.flush()
        before = num_descriptors()
        handle = segment_module.Handle(os.getpid(), other.fileno(), "mpipar-x")
        with pytest.raises(OSError, match="not the neighbour's"):
            segment_module._open(handle, 4096)
        assert num_descriptors() == before


def test_an_integer_accumulator_beside_the_float_one(comm: Communicator) -> None:
    """Sums on a fixed grid are exact: the same bits as one process's, whatever the order; the float's are not asked."""
    size, grid = 100_003, 2.0**-30
    arena = opened(comm, arena_bytes([4 * size, 8 * size]))
    floats, integers = arena.allocate(size, torch.float32, CPU), arena.allocate(size, torch.int64, CPU)
    microbatches = [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in range(2 * comm.size)]
    alone = sum((x.double() / grid).round().long() for x in microbatches)
    for x in microbatches[comm.rank :: comm.size]:
        floats += x
        integers += (x.double() / grid).round().long()
    works = [comm.start_all_reduce(floats), comm.start_all_reduce(integers)]
    for work in works:
        work.wait()
    assert torch.equal(integers, torch.as_tensor(alone))
    torch.testing.assert_close(floats.double(), integers.double() * grid, rtol=1e-5, atol=1e-5)


def test_a_processor_that_does_not_keep_the_order_of_stores(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks then meet in messages; what they called is compared all the same."""
    if comm.size == 1:
        pytest.skip("one rank has nobody to meet")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    other = comm.duplicate("other")
    arena = opened(other, 1 << 20)
    for x in (arena.allocate(100_001, torch.float32, CPU), torch.zeros(77), torch.zeros(200_000)):
        for _ in range(3):
            x.fill_(other.rank + 1)
            other.all_reduce(x)
            assert (x == other.size * (other.size + 1) / 2).all()
    other.barrier()
    lone = other.duplicate("lone")
    with pytest.raises(MessageError, match=r"rank \d called all_reduce\(sum\) of \d float64"):
        lone.all_reduce(np.zeros(lone.rank + 1))


@pytest.mark.parametrize("size", [10, 300_000])
def test_a_barrier_behind_reductions_that_are_under_way(comm: Communicator, size: int) -> None:
    """It waits for its turn: a meeting of its own is not taken for one of theirs."""
    arena = opened(comm, 1 << 22)
    x, y, private = (arena.allocate(size, torch.float32, CPU) for _ in range(3))
    private = private.clone()
    for i in range(20):
        for array in (x, y, private):
            array.fill_(comm.rank + i)
        if comm.rank == i % comm.size:
            sum(range(100_000))  # this one comes late
        works = [comm.start_all_reduce(array) for array in (x, private, y)]
        comm.barrier()
        for work, array in zip(works, (x, private, y), strict=True):
            work.wait()
            assert (array == comm.size * (comm.size - 1) / 2 + comm.size * i).all()
            array.fill_(-1)


@pytest.mark.parametrize("place", ["elsewhere in it", "outside"])
@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather"])
def test_arrays_at_different_places_are_an_error(comm: Communicator, collective: str, place: str) -> None:
    lone = comm.duplicate("lone")
    arena = opened(lone, 1 << 22)
    x, y = (arena.allocate(100_000, torch.float32, CPU) for _ in range(2))
    if lone.rank == lone.size - 1:
        x = y if place == "elsewhere in it" else torch.zeros(100_000)
    with pytest.raises(MessageError, match="lies elsewhere"):
        getattr(lone, collective)(x)
    with pytest.raises(MessageError, match="out of step"):
        lone.barrier()


def test_flags_and_messages_are_compared_with_each_other(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")
    lone = comm.duplicate("lone")
    with pytest.raises(MessageError, match="called"):
        if lone.rank == 0:
            lone.barrier()
        else:
            lone.broadcast(torch.zeros(3))
