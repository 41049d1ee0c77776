"""What microbatches come to, read once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpipar.train.metrics import Totals
from mpipar.train.readings import Readings


def scalar(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def test_they_are_a_ranks_part_of_the_step() -> None:
    """Of its microbatches and no others; a loss is not rounded on the way."""
    readings, totals = Readings(), Totals.none(5, 3)
    loss = 1 + 2**-40
    readings.add(3, scalar(loss, torch.float64).requires_grad_(), scalar(7, torch.int64))
    readings.add(1, scalar(0.5), scalar(9, torch.int64), fault=scalar(0))
    readings.read_into(totals, rank=2)
    assert totals.losses.tolist() == [0, 0.5, 0, loss, 0] and totals.num_tokens == 16
    assert totals.owners[1] == totals.owners[3] == 2 and not any(totals.faults)


@pytest.mark.parametrize(
    ("loss", "fault", "faulty"),
    [(1.0, 0.0, False), (1.0, 1.0, True), (math.nan, 0.0, True), (math.inf, None, True), (1.0, None, False)],
)
def test_a_fault_is_what_was_found_or_a_loss_that_is_no_number(loss: float, fault: float | None, faulty: bool) -> None:
    readings, totals = Readings(), Totals.none(2, 1)
    readings.add(0, scalar(loss), scalar(4), fault=None if fault is None else scalar(fault))
    readings.read_into(totals, rank=0)
    assert totals.faults.tolist() == [faulty, False]


def test_the_host_looks_at_a_number_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each look waits for all that was asked of it."""
    looks: list[str] = []

    def watched(name: str) -> Callable[[torch.Tensor], Any]:
        look = getattr(torch.Tensor, name)

        def watch(x: torch.Tensor) -> Any:
            looks.append(name)
            return look(x)

        return watch

    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    readings = Readings()
    for index in range(8):
        readings.add(index, scalar(index), scalar(3), fault=scalar(0))
    assert not looks
    readings.read_into(Totals.none(8, 1), rank=0)
    assert looks == ["tolist"]


def test_of_nothing() -> None:
    totals = Totals.none(2, 1)
    Readings().read_into(totals, rank=0)
    assert totals.num_tokens == 0 and not totals.losses.any()
