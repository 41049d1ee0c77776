"""The ring's collectives against sums in float64, for every dtype, for sizes around every boundary."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from mpipar.comm import Communicator
from mpipar.comm import ring as ring_module
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.call import Call
from mpipar.comm.lane import Work
from mpipar.comm.p2p import Account, Wire
from mpipar.comm.pending import Algorithm, Message
from mpipar.comm.prepared import Operation
from mpipar.errors import MessageError

NUMPY_DTYPES = [
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]
TORCH_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]
SIZES = [0, 1, 2, 3, 5, 7, 64, 1023, 4099]

# Relative to the sum of magnitudes: each of n - 1 additions rounds once.
UNIT_ROUNDOFF = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24, "float64": 2**-53}


def draw(size: int, rank: int, dtype: str) -> np.ndarray:
    """What a rank brings: floats of mixed signs, or small integers, in float64; any rank can draw any other's."""
    rng = np.random.default_rng([size, rank])
    if dtype.startswith(("int", "uint")):
        return rng.integers(0, 8, size).astype(np.float64)
    # Values that every float dtype has, so that only the additions round.
    return rng.integers(-127, 128, size) / 16.0


def check(result: np.ndarray, op: str, size: int, comm: Communicator, dtype: str) -> None:
    given = np.stack([draw(size, rank, dtype) for rank in range(comm.size)])
    expected = {"sum": given.sum(0), "mean": given.mean(0), "max": given.max(0)}[op]
    bound = UNIT_ROUNDOFF.get(dtype, 0.0) * comm.size * np.abs(given).sum(0)
    assert (np.abs(result.astype(np.float64) - expected) <= (0 if op == "max" else bound)).all()


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_all_reduce_numpy(comm: Communicator, dtype: str, op: Op) -> None:
    if op == "mean" and "int" in dtype:
        with pytest.raises(MessageError, match="mean of"):
            comm.all_reduce(np.zeros(3, dtype), op)
        return
    for size in SIZES:
        x = draw(size, comm.rank, dtype).astype(dtype)
        assert comm.all_reduce(x, op) is x
        check(x, op, size, comm, dtype)


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_all_reduce_torch(comm: Communicator, dtype: torch.dtype, op: Op) -> None:
    name = str(dtype).removeprefix("torch.")
    if op == "mean" and not dtype.is_floating_point:
        return
    for size in SIZES:
        x = torch.from_numpy(draw(size, comm.rank, name)).to(dtype)
        comm.all_reduce(x, op)
        check(x.double().numpy(), op, size, comm, name)


@pytest.mark.parametrize("segment_bytes", [8, 24, 64, 1000, 1 << 20])
def test_segments_of_any_size(comm: Communicator, segment_bytes: int) -> None:
    """Small segments are many messages in flight; their order and the reuse of their memory must hold."""
    for size in (1, 2, 5, 97, 1000):
        x = draw(size, comm.rank, "float64")
        run_ring(comm, lambda wire, b: ring_module.all_reduce(wire, b, "sum", segment_bytes), x)
        check(x, "sum", size, comm, "float64")


def run_ring(comm: Communicator, algorithm, x: np.ndarray) -> None:
    buffer = Buffer(x)
    comm._start(Operation(Call("barrier"), send=lambda wire: algorithm(wire, buffer))).wait()


def test_reduce_scatter_then_all_gather(comm: Communicator) -> None:
    for size in SIZES:
        x = draw(size, comm.rank, "float64")
        comm.reduce_scatter(x)
        mine = comm.chunk(size)
        given = np.sum([draw(size, rank, "float64") for rank in range(comm.size)], axis=0)
        assert np.allclose(x[mine], given[mine], rtol=1e-14)
        comm.all_gather(x)
        assert np.allclose(x, given, rtol=1e-14)


def test_chunks_cover_an_array_once(comm: Communicator) -> None:
    for size in SIZES:
        covered = np.zeros(size, int)
        for rank in range(comm.size):
            covered[comm.chunk(size, rank)] += 1
        assert (covered == 1).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_infinity_and_nan_are_values(comm: Communicator, dtype: str) -> None:
    """They are passed on without a warning, as torch does: whoever asked for the sum looks at it."""
    huge = np.finfo(dtype).max
    x = np.array([huge, np.inf, np.nan, 1], dtype)
    comm.all_reduce(x)
    assert np.isinf(x[0]) == (comm.size > 1) and np.isinf(x[1]) and np.isnan(x[2]) and x[3] == comm.size


def test_results_have_the_same_bits_on_all_ranks(comm: Communicator) -> None:
    x = torch.randn(10_001, generator=torch.Generator().manual_seed(comm.rank))
    comm.all_reduce(x)
    assert len({bits.tobytes() for bits in comm.all_gather_object(x.numpy())}) == 1


def test_non_contiguous_arrays_keep_their_layout(comm: Communicator) -> None:
    whole = np.full((6, 8), -1.0)
    view = whole[::2, 1:7:3]
    view[...] = comm.rank + 1
    comm.all_reduce(view)
    assert (view == comm.size * (comm.size + 1) / 2).all()
    untouched = whole.copy()
    untouched[::2, 1:7:3] = -1
    assert (untouched == -1).all()
    tensor = torch.full((4, 3), float(comm.rank)).t()
    comm.all_reduce(tensor, "max")
    assert (tensor == comm.size - 1).all() and tensor.shape == (3, 4)


def test_a_parameter_can_be_reduced(comm: Communicator) -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    comm.all_reduce(weight)
    assert (weight == comm.size).all() and weight.requires_grad


@pytest.mark.parametrize("root", ["first", "last"])
def test_broadcast(comm: Communicator, root: str) -> None:
    source = 0 if root == "first" else comm.size - 1
    for size in (0, 1, 1000, 300_001):
        x = draw(size, comm.rank, "float64")
        if comm.rank == source:
            x.flags.writeable = False  # the root's array is only read
        comm.broadcast(x, source)
        assert (x == draw(size, source, "float64")).all()


def test_a_state_is_broadcast_where_it_lies(comm: Communicator) -> None:
    def tensors(rank: int) -> dict[str, torch.Tensor]:
        return {
            "weight": torch.full((3, 5), float(rank)),
            "steps": torch.tensor(rank),
            "bf": torch.ones(7).bfloat16() * rank,
        }

    state, root = tensors(comm.rank), comm.size - 1
    if comm.rank == 0:
        state = dict(reversed(state.items()))
    places = {name: x.data_ptr() for name, x in state.items()}
    comm.broadcast_state(state, root)
    assert all(torch.equal(x, tensors(root)[name]) and x.data_ptr() == places[name] for name, x in state.items())


def test_a_state_of_another_model_is_named(comm: Communicator) -> None:
    lone = comm.duplicate("lone")
    state = {"a": torch.zeros(3), "b": torch.zeros(2 + (comm.rank > 0))}
    if comm.rank == 0:
        lone.broadcast_object({"a": "(3,) float32", "b": "(2,) float32"})
    else:
        with pytest.raises(MessageError, match=r"b is \(2,\) float32 there and \(3,\) float32 here"):
            lone.broadcast_state(state)


def test_started_operations_finish_in_any_order_of_waiting(comm: Communicator) -> None:
    arrays = [draw(size, comm.rank, "float64") for size in (5, 100_000, 1, 3000)]
    works: list[Work] = [comm.start_all_reduce(x) for x in arrays]
    for i in (2, 0, 3, 1):
        works[i].wait()
        assert works[i].done
    for x in arrays:
        check(x, "sum", x.size, comm, "float64")


def test_two_communicators_do_not_wait_for_each_other(comm: Communicator) -> None:
    """Ranks may start operations on different axes in different orders."""
    other = comm.duplicate("other")
    x, y = np.ones(50_000), np.ones(70_000)
    if comm.rank % 2:
        first, second = other.start_all_reduce(y), comm.start_all_reduce(x)
    else:
        second, first = comm.start_all_reduce(x), other.start_all_reduce(y)
    first.wait()
    second.wait()
    assert (x == comm.size).all() and (y == comm.size).all()
    other.free()


def test_barrier_waits_for_all(comm: Communicator) -> None:
    arrived = np.zeros(comm.size)
    arrived[comm.rank] = 1
    work = comm.start_all_reduce(arrived)
    comm.barrier()
    work.wait()
    assert (arrived == 1).all()


def test_bytes_sent_is_the_least_possible(comm: Communicator) -> None:
    n, size = comm.size, 10 * 12 * 7
    before = comm.bytes_sent
    comm.all_reduce(np.ones(size, np.float32), algorithm="ring")
    assert comm.bytes_sent - before == 2 * (n - 1) * size * 4 // n


def free_memory_gib() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.skipif(free_memory_gib() < 12, reason="less than 12 GiB of memory are free")
def test_more_elements_than_mpi_can_count(comm: Communicator) -> None:
    """2^31 + 5 of them."""
    if comm.size != 2:
        pytest.skip("two ranks show it; more would only take more memory")
    x = np.full(2**31 + 5, comm.rank + 1, np.uint8)
    comm.all_reduce(x)
    assert x.min() == x.max() == 3


def test_objects(comm: Communicator) -> None:
    assert comm.all_gather_object({"rank": comm.rank, "text": "x" * comm.rank**3}) == [
        {"rank": r, "text": "x" * r**3} for r in range(comm.size)
    ]
    assert comm.broadcast_object(("from", comm.rank), root=comm.size - 1) == ("from", comm.size - 1)


@pytest.mark.parametrize("expected", [4, 20])
def test_sizes_that_differ_are_an_error_and_no_wrong_value(comm: Communicator, expected: int) -> None:
    """A message that is longer or shorter than expected is noticed by the rank that receives it."""
    lone = comm.duplicate("lone")
    if comm.size > 1 and comm.rank == 0:
        lone.send(np.ones(10), 1)
    if comm.rank == 1:
        with pytest.raises(
            MessageError, match=f"where {8 * expected} were expected: all ranks .* the same size and dtype"
        ):
            lone.receive(np.ones(expected), 0)


def test_a_broadcast_of_another_size_is_an_error(comm: Communicator) -> None:
    lone = comm.duplicate("lone")
    if comm.rank < 2:
        x = np.full(10 + 10 * comm.rank, float(comm.rank))
        if comm.rank == 1:
            with pytest.raises(MessageError, match=r"of 20 float64 #1 on axis 'lone': rank 0 called .* of 10"):
                lone.broadcast(x)
        else:
            lone.start_broadcast(x)


@pytest.mark.parametrize("segment_bytes", [8, 64, 1 << 20])
def test_memory_is_never_in_two_messages(comm: Communicator, segment_bytes: int) -> None:
    """Where a segment is received, no older value of it is awaited or being sent; and every message is completed."""
    for size in (1, 2, 3, comm.size, 4 * comm.size + 1):
        wires: list[WatchedWire] = []

        def watched(wire: Wire, x: Buffer, wires: list[WatchedWire] = wires) -> Algorithm:
            wires.append(WatchedWire(wire))
            return ring_module.all_reduce(wires[0], x, "sum", segment_bytes)  # type: ignore[arg-type]

        run_ring(comm, watched, np.ones(size))
        assert all(pending.through() for _, _, _, pending in wires[0].messages)


class WatchedWire:
    """A wire that knows the memory of every message under way."""

    def __init__(self, wire: Wire):
        self.wire, self.rank, self.size, self.scratch = wire, wire.rank, wire.size, wire.scratch
        self.messages: list[tuple[Buffer, int, int, Message]] = []

    def send(self, buffer: Buffer, start: int, stop: int, to: int) -> Message:
        self.messages.append((buffer, start, stop, self.wire.send(buffer, start, stop, to)))
        return self.messages[-1][3]

    def receive(self, buffer: Buffer, start: int, stop: int, source: int) -> Message:
        for other, a, b, pending in self.messages:
            overlaps = other is buffer and a < stop and start < b
            assert not overlaps or pending.through(), f"elements {start} to {stop} are in a message under way"
        self.messages.append((buffer, start, stop, self.wire.receive(buffer, start, stop, source)))
        return self.messages[-1][3]


def test_wires_of_different_collectives_do_not_mix(comm: Communicator) -> None:
    world = comm._comm
    assert Wire.for_collective(world, 1, Account())._tag != Wire.for_collective(world, 2, Account())._tag
    assert Wire.for_collective(world, 10**9, Account())._tag < 32_768  # the least upper bound that MPI promises
