"""MPI's own all-reduce does what the others do, or is not taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mpipar.comm import Communicator
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.native import can_add

DTYPES = ["float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["sum", "mean", "max"])
def test_it_adds_up(comm: Communicator, dtype: str, op: Op) -> None:
    """Small whole numbers, of which every dtype has the exact sum."""
    if op == "mean" and "int" in dtype:
        pytest.skip("integers have no mean")
    for size in (0, 1, 1001):
        given = np.stack([(np.arange(size) * 7 + rank * 3) % 11 for rank in range(comm.size)])
        x = given[comm.rank].astype(dtype)
        assert can_add(Buffer(x), op) == (op != "max" or "int" in dtype)
        comm.all_reduce(x, op, algorithm="mpi")
        expected = {"sum": given.sum(0), "mean": given.sum(0) / comm.size, "max": given.max(0)}[op]
        np.testing.assert_allclose(x, expected, rtol=1e-6 if op == "mean" else 0)


def test_a_maximum_keeps_what_is_no_number(comm: Communicator) -> None:
    """MPI may lose it, so another algorithm is taken though this one was asked for."""
    x = np.array([comm.rank, math.nan if comm.rank == comm.size - 1 else 1.0])
    comm.all_reduce(x, "max", algorithm="mpi")
    assert x[0] == comm.size - 1 and math.isnan(x[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_floats_are_left_to_the_others(comm: Communicator, dtype: torch.dtype) -> None:
    x = torch.full((33,), 1.5, dtype=dtype)
    assert not can_add(Buffer(x), "sum")
    comm.all_reduce(x, algorithm="mpi")
    assert x.tolist() == [1.5 * comm.size] * 33
