"""A step with a loss scale: what one rank finds, all decide on alike.

float16 on the CPU, which the trainer refuses because it is slow, rounds as on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpipar.comm import Communicator
from mpipar.train.config import PrecisionName
from mpipar.train.metrics import StepMetrics
from mpipar.train.source import Source
from mpipar.train.step import TrainStep
from tests.parallel.small_data import small_step


def go(step: TrainStep, source: Source, number: int) -> StepMetrics:
    while True:
        computed = step.compute(number, source, stop=False)
        if step.fits():
            return step.apply(computed)


@pytest.mark.parametrize("reproducible", [True, False])
def test_one_ranks_infinite_gradient_is_everybodys(comm: Communicator, shared_path: Path, reproducible: bool) -> None:
    step, source = small_step(comm, shared_path, reproducible=reproducible, precision="fp16")
    assert step.scale is not None
    began, kept = step.scale.exponent, step.scale.state()["exponent"]
    weights = step.digest()
    poison = torch.zeros(())

    def poisoned(gradient: Tensor) -> Tensor:
        return gradient + poison

    dict(step.model.named_parameters())["norm.weight"].register_hook(poisoned)
    if comm.rank == comm.size - 1:
        poison.fill_(math.inf)
    for number in range(3):
        measured = go(step, source, number)
        assert measured.skipped and measured.loss_scale == 2.0 ** (began - number)
    assert step.digest() == weights, "no weight is changed"
    assert step.skipped_in_a_row == 0, "the scale still falls"
    poison.zero_()
    measured = go(step, source, 3)
    assert not measured.skipped and math.isfinite(measured.grad_norm)
    assert step.digest() != weights
    assert (
        comm.all_gather_object((step.digest(), step.scale.state())) == [(step.digest(), step.scale.state())] * comm.size
    )
    assert step.scale.state() == {"exponent": kept - 3, "good_steps": 1}
    while step.scale.can_fall:
        step.scale.move_on(finite=False)
    poison.fill_(math.nan)
    assert go(step, source, 4).skipped and step.skipped_in_a_row == 1, "it cannot be the scale"
    source.close()
    step.replicas.close()


@pytest.mark.parametrize("reproducible", [True, False])
def test_the_scale_does_not_show(comm: Communicator, shared_path: Path, reproducible: bool) -> None:
    """With float32 products, in which no gradient leaves the range: the bits do not depend on it."""
    found = []
    for exponent in (0, 7, -5):
        step, source = small_step(comm, shared_path, reproducible=reproducible, precision="fp16")
        assert step.scale is not None
        step._config = replace(step._config, train=replace(step._config.train, precision="fp32"))
        step.scale.exponent = exponent
        losses = [go(step, source, number).loss for number in range(3)]
        found.append((losses, step.digest(), None if step.grids is None else step.grids.tops))
        source.close()
        step.replicas.close()
    assert found[0] == found[1] == found[2]


def test_half_precision_is_near_single(comm: Communicator, shared_path: Path) -> None:
    losses = []
    names: list[PrecisionName] = ["fp32", "fp16"]
    for precision in names:
        step, source = small_step(comm, shared_path, reproducible=True, precision=precision)
        losses.append([go(step, source, number).loss for number in range(4)])
        source.close()
        step.replicas.close()
    assert all(math.isclose(a, b, rel_tol=1e-2) for a, b in zip(*losses, strict=True))
    assert losses[0] != losses[1]
