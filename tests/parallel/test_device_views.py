"""Arrays on a GPU, for an MPI that takes pointers to its memory: nothing is handed over before it was made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from mpipar.comm import Communicator, ring
from mpipar.comm.buffers import Op
from mpipar.comm.device import views as views_module
from tests.stand_in.runtime import StandIn
from tests.sums import check, draw, expected


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_all_reduce(views: Communicator, device: StandIn, dtype: torch.dtype, op: Op) -> None:
    if op == "mean" and not dtype.is_floating_point:
        return
    for size in (1, 5, 4099, 1_500_000):  # the last in several segments
        x = device.array(size, dtype)
        for _ in range(2):  # the second in the same scratch memory
            device.put(x, draw(size, views.rank, dtype))
            views.all_reduce(x, op)
            check(device.get(x), expected(views, size, dtype, op), op)


def test_several_under_way(views: Communicator, device: StandIn) -> None:
    arrays = [device.array(size, torch.float32) for size in (700_000, 3, 90_000)]
    for i in range(3):
        for x in arrays:
            device.put(x, torch.full((len(x),), float(views.rank + i)))
        for work in [views.start_all_reduce(x) for x in arrays]:
            work.wait()
    for x in arrays:
        assert (device.get(x) == views.size * (views.size - 1) / 2 + views.size * 2).all()


def test_shards(views: Communicator, device: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many segments: what is added up last is not passed on, and where it arrived the next one does."""
    monkeypatch.setattr(ring, "reduce_scatter", partial(ring.reduce_scatter, segment_bytes=8192))
    size = 200_001
    x = device.array(size, torch.float32)
    device.put(x, draw(size, views.rank, torch.float32))
    views.reduce_scatter(x)
    views.all_gather(x)
    check(device.get(x), expected(views, size, torch.float32, "sum"))


def test_messages_between_two(views: Communicator, device: StandIn) -> None:
    """What is sent was made before, and what is received is written when nobody reads what was there any more."""
    out, into = device.array(400_000, torch.float32), device.array(400_000, torch.float32)
    left, right = (views.rank - 1) % views.size, (views.rank + 1) % views.size
    device.put(into, torch.zeros(len(into)))
    kept: list[torch.Tensor] = []
    device.later(lambda: kept.append(into.clone()), reads=[into])
    device.put(out, draw(len(out), views.rank, torch.float32) + 1)
    works = [views.start_send(out, right), views.start_receive(into, left)]
    for work in works:
        work.wait()
    check(device.get(into), draw(len(out), left, torch.float32).double() + 1)
    assert (kept[0] == 0).all()


def test_an_algorithm_that_does_not_wait_is_seen(
    views: Communicator, device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty: Callable[..., list[object]] = lambda view, start, stop: view._begin() or []  # noqa: E731
    monkeypatch.setattr(views_module.View, "coming", hasty)
    out = device.array(1000, torch.float32)
    device.put(out, torch.ones(1000))
    with pytest.raises(AssertionError, match="coming"):
        views.start_send(out, views.rank).wait()
