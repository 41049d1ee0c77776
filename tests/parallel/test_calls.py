"""Ranks that call different things, and ranks that do not come: named, by every algorithm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mpipar.comm import Communicator
from mpipar.comm.call import is_compared
from mpipar.comm.select import AllReduce
from mpipar.errors import MessageError, StallError

ALGORITHMS: list[AllReduce] = ["shared", "ring", "mpi"]


@pytest.fixture
def lone(comm: Communicator) -> Communicator:
    """What a test leaves under way here is in nobody's way."""
    if comm.size == 1:
        pytest.skip("one rank cannot disagree with itself")
    return comm.duplicate("lone")


def expect_mismatch(lone: Communicator, call: Callable[[int], object], pattern: str) -> None:
    """The first two ranks call with 0 and 1; one that hears of the other raises. Both do if all meet."""
    last = lone.size - 1
    try:
        call(1 if lone.rank == last else 0)
    except MessageError as error:
        heard = error.message
    except StallError:  # its neighbour on the wire agreed with it, and then went no further
        heard = ""
    told = [text for text in lone_objects(lone, heard) if text]
    assert told
    for text in told:
        assert all(word in text for word in pattern.split("|")), text


def lone_objects(lone: Communicator, value: str) -> list[str]:
    """Of all ranks, past a communicator that is out of step."""
    return lone._comm.allgather(value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sizes_that_differ(lone: Communicator, algorithm: AllReduce) -> None:
    lone.progress.timeout_s = 0.2
    expect_mismatch(
        lone,
        lambda which: lone.all_reduce(np.zeros(1000 + which), algorithm=algorithm),
        "all_reduce(sum)|1,000 float64|1,001 float64|called|must make the same call",
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dtypes_of_one_size_that_differ(lone: Communicator, algorithm: AllReduce) -> None:
    lone.progress.timeout_s = 0.2
    expect_mismatch(
        lone,
        lambda which: lone.all_reduce(np.zeros(8, ["float32", "int32"][which]), algorithm=algorithm),
        "8 float32|8 int32",
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_operations_that_differ(lone: Communicator, algorithm: AllReduce) -> None:
    lone.progress.timeout_s = 0.2
    expect_mismatch(
        lone,
        lambda which: lone.all_reduce(np.zeros(8), "max" if which else "sum", algorithm),
        "all_reduce(max)|all_reduce(sum)",
    )


def test_collectives_that_differ(lone: Communicator) -> None:
    lone.progress.timeout_s = 0.2
    expect_mismatch(
        lone,
        lambda which: lone.broadcast(np.zeros(8)) if which else lone.all_gather(np.zeros(8)),
        "broadcast from rank 0 of 8 float64|all_gather of 8 float64",
    )


def test_roots_that_differ(lone: Communicator) -> None:
    lone.progress.timeout_s = 0.2
    expect_mismatch(lone, lambda which: lone.broadcast(np.zeros(8), which), "from rank 0|from rank 1")


def test_shards_that_differ(lone: Communicator) -> None:
    lone.progress.timeout_s = 0.2
    sizes = [4] * lone.size
    other = [5, 3, *sizes[2:]]
    expect_mismatch(
        lone,
        lambda which: lone.reduce_scatter(np.zeros(4 * lone.size), sizes=other if which else sizes),
        "gave other sizes of shards",
    )


def test_it_is_compared_at_first_and_then_in_a_sample() -> None:
    compared = [sequence for sequence in range(1, 1001) if is_compared(sequence)]
    assert compared[:64] == list(range(1, 65))
    assert 10 <= len(compared) - 64 <= 20


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rank_that_does_not_come_is_named_once(lone: Communicator, algorithm: AllReduce) -> None:
    """The lowest rank that waits reports; it says who waits, and who does not come."""
    lone.barrier()
    last = lone.size - 1
    lone.progress.timeout_s = 0.3
    report = ""
    if lone.rank != last:
        with pytest.raises(StallError) as stall:
            lone.all_reduce(np.zeros(100), algorithm=algorithm)
        report = stall.value.message
    reports = lone_objects(lone, report)
    waited = "Rank 0 waited" if last == 1 else f"Ranks {', '.join(map(str, range(last)))} waited"
    assert reports[0].startswith("all_reduce(sum) of 100 float64 #2 on axis 'lone': nothing moved for ")
    assert f"Rank {last} did not arrive" in reports[0]
    assert waited in reports[0]


def test_a_rank_that_waits_in_another_operation_is_named(lone: Communicator) -> None:
    other = lone.duplicate("other")
    lone.barrier()  # out of MPI_Comm_dup, in which a rank gives no sign, and may be long where ranks share cores
    lone.progress.timeout_s = 0.3
    last = lone.size - 1
    report = ""
    with pytest.raises(StallError) as stall:
        if lone.rank == last:
            other.barrier()
        else:
            lone.barrier()
    report = stall.value.message
    reports = lone_objects(lone, report)
    assert f"Rank {last} is in barrier #1 on axis 'other'" in reports[0]
