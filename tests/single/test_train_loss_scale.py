"""The loss scale, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpipar.train import loss_scale
from mpipar.train.loss_scale import LossScale


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 5))
def test_it_moves_as_torchs_does(steps: list[bool], interval: int) -> None:
    """Within its bounds, which torch's does not have."""
    scale = LossScale(tokens=1024)
    theirs, tracker = torch.full((1,), scale.factor), torch.zeros(1, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_STEPS", interval)
        for finite in steps:
            torch._amp_update_scale_(theirs, tracker, torch.full((1,), float(not finite)), 2.0, 0.5, interval)
            scale.move_on(finite=finite)
            if not 2.0**-10 < theirs.item() < 2.0**14:
                return
            assert scale.factor == theirs.item() and scale.good_steps == tracker.item()


@pytest.mark.parametrize("tokens", [1, 2, 1000, 1024, 65536])
def test_it_begins_as_for_a_mean(tokens: int) -> None:
    scale = LossScale(tokens)
    assert 2**15 < scale.factor * tokens <= 2**16
    assert scale.factor == 2.0**scale.exponent


def test_it_has_a_floor_and_a_ceiling() -> None:
    scale = LossScale(tokens=4)
    falls = 0
    while scale.can_fall:
        scale.move_on(finite=False)
        falls += 1
    assert falls == 16 and scale.factor == 1 / 4
    scale.move_on(finite=False)
    assert scale.factor == 1 / 4
    for _ in range(40 * loss_scale.GROWTH_STEPS):
        scale.move_on(finite=True)
    assert scale.factor == 2.0**22


@given(st.lists(st.booleans(), max_size=50), st.lists(st.booleans(), max_size=50))
def test_a_checkpoint_changes_nothing(before: list[bool], after: list[bool]) -> None:
    straight, stopped = LossScale(100), LossScale(100)
    for finite in before:
        straight.move_on(finite=finite)
        stopped.move_on(finite=finite)
    resumed = LossScale(100)
    resumed.restore(stopped.state())
    for finite in after:
        straight.move_on(finite=finite)
        resumed.move_on(finite=finite)
    assert straight.state() == resumed.state()


def test_microbatches_of_another_size() -> None:
    """The gradients of a mean are scaled as before."""
    small, large = LossScale(128), LossScale(4096)
    for _ in range(3):
        small.move_on(finite=False)
    large.restore(small.state())
    assert large.factor * 4096 == small.factor * 128


def test_a_checkpoint_without_a_scale() -> None:
    scale = LossScale(100)
    scale.restore({})
    assert scale.state() == LossScale(100).state()
