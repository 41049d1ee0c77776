"""Gradients summed without rounding: the bits of one process, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mpipar.comm import Communicator
from mpipar.model import ModelConfig, Transformer, begin_microbatch, initialise
from mpipar.parallel import DataParallel, Grids

NUM_MICROBATCHES = 9


def build(dropout: float = 0.0) -> Transformer:
    config = ModelConfig(family="gpt2", layers=2, dim=32, heads=4, max_seq_len=16, dropout=dropout)
    model = Transformer(config, vocab_size=64)
    initialise(model, seed=3)
    return model


def tokens(i: int) -> Tensor:
    return torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(i))


def exact(model: Transformer, comm: Communicator, grids: Grids | None = None, **options: bool) -> DataParallel:
    grids = grids or Grids(NUM_MICROBATCHES)
    replicas = DataParallel(model, comm, bucket_bytes=1 << 13, grids=grids, **options)
    model.as_head = replicas.separate_use("embedding.weight")
    return replicas


def run_step(model: Transformer, replicas: DataParallel, mine: list[int], step: int = 0) -> float:
    """One step as the trainer does it. Returns the norm."""
    for i in mine:
        begin_microbatch(model, 1, step, i)
        with replicas.final_backward() if i == mine[-1] else nullcontext():
            model.loss(tokens(step * NUM_MICROBATCHES + i))[0].backward()
    replicas.reduce(np.zeros(0))
    assert replicas.grids is not None
    replicas.grids.move_on(replicas.largest)
    return replicas.gradient_norm()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def deal(comm: Communicator) -> list[int]:
    return list(range(comm.rank, NUM_MICROBATCHES, comm.size))


def backwards(comm: Communicator) -> list[int]:
    """All on rank 0 but the last few, in falling order: as no static dealing would."""
    return [*range(NUM_MICROBATCHES - 1, comm.size - 2, -1)] if comm.rank == 0 else [comm.rank - 1]


@pytest.fixture
def alone(comm: Communicator) -> Communicator:
    """This rank, by itself."""
    return comm.split("alone", color=comm.rank, key=0)


@pytest.mark.parametrize("dealt", [deal, backwards])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_bits_of_one_process(
    comm: Communicator, alone: Communicator, dealt: Callable[[Communicator], list[int]], share: bool, dropout: float
) -> None:
    """Gradients and their norm, in three steps with an optimizer between: whoever computes which microbatch."""
    model, single = build(dropout), build(dropout)
    replicas, reference = exact(model, comm, share=share), exact(single, alone)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True) for m in (model, single)]
    for step in range(3):
        norm = run_step(model, replicas, dealt(comm), step)
        assert norm == run_step(single, reference, list(range(NUM_MICROBATCHES)), step)
        for mine, its in zip(gradients(model), gradients(single), strict=True):
            assert torch.equal(mine, its)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for p, q in zip(model.parameters(), single.parameters(), strict=True):
        assert torch.equal(p, q)
    replicas.close()
    reference.close()


def test_closer_to_float64_than_a_sum_of_floats(comm: Communicator) -> None:
    """Beside the same microbatch gradients added up in float64, and as ordinary mode does it."""
    model, ordinary = build(), build()
    replicas, plain = exact(model, comm), DataParallel(ordinary, comm)
    run_step(model, replicas, deal(comm))
    model.zero_grad(set_to_none=True)
    run_step(model, replicas, deal(comm))  # on the grids that the first step has found
    for i in deal(comm):
        ordinary.loss(tokens(i))[0].backward()
    plain.reduce(np.zeros(0))
    each = build()
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in each.parameters()]
    for i in range(NUM_MICROBATCHES):
        each.loss(tokens(i))[0].backward()
        for total, p in zip(sums, each.parameters(), strict=True):
            assert p.grad is not None
            total += p.grad
        each.zero_grad(set_to_none=True)

    def error(model: nn.Module) -> float:
        pairs = zip(gradients(model), sums, strict=True)
        return math.sqrt(sum((g - s).norm().item() ** 2 for g, s in pairs))

    assert error(model) < error(ordinary)
    replicas.close()
    plain.close()


def test_a_contribution_that_does_not_fit_is_seen_on_all_ranks(comm: Communicator, alone: Communicator) -> None:
    """All find the same tensors too large for their grids, and the second attempt has the bits of one rank."""

    def attempt(model: Transformer, replicas: DataParallel, mine: list[int]) -> list[str]:
        for i in mine:
            with replicas.final_backward() if i == mine[-1] else nullcontext():
                model.loss(tokens(i))[0].backward()
        replicas.reduce(np.zeros(0))
        assert replicas.grids is not None
        over = replicas.grids.overflowed(replicas.largest)
        replicas.grids.move_on(replicas.largest)
        model.zero_grad(set_to_none=not over)
        return over

    results = []
    for ranks, mine in ((comm, deal(comm)), (alone, list(range(NUM_MICROBATCHES)))):
        model, grids = build(), Grids(NUM_MICROBATCHES)
        grids.tops = {"embedding.weight": -30, "norm.weight": -40}
        replicas = exact(model, ranks, grids)
        assert attempt(model, replicas, mine) == ["norm.weight", "embedding.weight"]
        assert attempt(model, replicas, mine) == []
        results.append((dict(grids.tops), [bucket.flat.clone() for bucket in replicas.buckets]))
        replicas.close()
    assert results[0][0] == results[1][0]
    assert all(torch.equal(mine, its) for mine, its in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_all_ranks_and_is_no_overflow(comm: Communicator, value: float) -> None:
    model = build()
    replicas = exact(model, comm)
    for i in deal(comm):
        factor = value if i == NUM_MICROBATCHES - 1 else 1.0
        (model.loss(tokens(i))[0] * factor).backward()
    replicas.reduce(np.zeros(0))
    assert replicas.grids is not None and not replicas.grids.overflowed(replicas.largest)
    assert not math.isfinite(replicas.gradient_norm())
    replicas.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_moves_no_grid(value: float) -> None:
    """Where another tensor has overflowed, and the step is done again."""
    grids = Grids(NUM_MICROBATCHES)
    grids.tops = {"faulty": -20, "large": -20}
    largest = {"faulty": value, "large": 1.5, "new": value}
    assert grids.overflowed(largest) == ["large"]
    grids.move_on(largest)
    assert grids.tops == {"faulty": -20, "large": 1}


def test_a_parameter_without_gradient_has_none(comm: Communicator) -> None:
    model = build()
    model.unused = nn.Parameter(torch.zeros(3))
    replicas = exact(model, comm)
    run_step(model, replicas, deal(comm))
    assert model.unused.grad is None and model.norm.weight.grad is not None
    assert replicas.largest["unused"] == 0
    assert replicas.grids is not None and "unused" not in replicas.grids.tops
    replicas.close()
