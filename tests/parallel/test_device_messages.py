"""Collectives of arrays on a GPU that go in messages: through pinned memory of the host, or as MPI finds them."""

from __future__ import annotations

import torch

from mpipar.comm import Communicator
from tests.stand_in.runtime import StandIn
from tests.sums import check, draw, expected


def test_broadcast(carried: Communicator, device: StandIn) -> None:
    x = device.array(600_000, torch.float32)
    for root in range(carried.size):
        device.put(x, torch.full((len(x),), float(carried.rank)))
        carried.broadcast(x, root)
        assert (device.get(x) == root).all()


def test_doubles_converted(carried: Communicator, device: StandIn) -> None:
    x, into = device.array(5000, torch.float64), device.array(5000, torch.float32)
    device.put(x, draw(5000, carried.rank, torch.float64))
    carried.start_all_reduce_into(into, x).wait()
    check(device.get(into), expected(carried, 5000, torch.float64, "sum"))


def test_all_to_all(carried: Communicator, device: StandIn) -> None:
    n = carried.size
    out, into = device.array(n * 1000, torch.float32), device.array(n * 1000, torch.float32)
    device.put(out, torch.arange(n).repeat_interleave(1000) * 10.0 + carried.rank)
    carried.all_to_all(out, into)
    assert torch.equal(device.get(into), torch.arange(n).repeat_interleave(1000) + 10.0 * carried.rank)
