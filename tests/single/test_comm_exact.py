"""Rounding onto a grid, and sums that then do not round."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpipar import compiled
from mpipar.comm import exact

needs_compiler = pytest.mark.skipif(not compiled.is_built(), reason="rounding.c was not built: no C compiler")


def gradients(seed: int, count: int, size: int, spread: int) -> list[Tensor]:
    """Values over `spread` powers of two."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, size)) * 2.0 ** rng.integers(-spread, 1, (count, size))
    return list(torch.from_numpy(values.astype(np.float32)))


def add_up(values: list[Tensor], spacing: float) -> Tensor:
    total = torch.full_like(values[0], math.nan, dtype=torch.float64)
    for i, x in enumerate(values):
        exact.add_rounded(total, x, spacing, first=i == 0)
    return total


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 40),
    size=st.integers(1, 300),
    ranks=st.integers(1, 9),
    top=st.integers(-100, 100),
)
def test_any_order_and_grouping_has_the_same_bits(seed: int, count: int, size: int, ranks: int, top: int) -> None:
    values = [x * 2.0**top for x in gradients(seed, count, size, spread=30)]
    spacing = exact.spacing(top + 3, exact.carry_bits(count))
    expected = add_up(values, spacing)
    shuffled = random.Random(seed).sample(values, count)
    groups = [shuffled[r::ranks] for r in range(ranks) if shuffled[r::ranks]]
    partial_sums = [add_up(group, spacing) for group in groups]
    assert torch.equal(torch.stack(partial_sums).sum(0), expected)


@given(seed=st.integers(0, 2**32), count=st.integers(1, 30), top=st.integers(-60, 60))
def test_the_sum_is_that_of_fractions(seed: int, count: int, top: int) -> None:
    """Nothing but the rounding of each contribution is lost, even where all are as large as the limit allows."""
    rng = np.random.default_rng(seed)
    values = (rng.uniform(-1, 1, count) * exact.limit(top)).astype(np.float32)
    values[rng.random(count) < 0.3] = exact.limit(top)
    spacing = exact.spacing(top, exact.carry_bits(count))
    total = add_up([torch.tensor([value]) for value in values], spacing)
    step = Fraction(spacing)
    rounded = [round(Fraction(float(value)) / step) * step for value in values]  # ties to even
    assert Fraction(total.item()) == sum(rounded)


@given(seed=st.integers(0, 2**32), size=st.integers(0, 70_000), first=st.booleans(), special=st.booleans())
@needs_compiler
def test_compiled_and_plain_give_the_same_bits(seed: int, size: int, first: bool, special: bool) -> None:
    (x,) = gradients(seed, 1, size, spread=60)
    if special and size > 3:
        x[:3] = torch.tensor([math.inf, math.nan, -math.inf])[torch.randperm(3)]
    start = torch.full((size,), math.nan) if first else torch.randint(-1000, 1000, (size,))
    totals = [start.double(), start.double()]
    spacing = exact.spacing(1, 4)
    largest = exact.add_rounded(totals[0], x, spacing, first=first)
    plain = exact.add_rounded(totals[1], x.double(), spacing, first=first)  # of doubles there is no compiled version
    assert np.array_equal(totals[0].numpy().view(np.int64), totals[1].numpy().view(np.int64)) or special
    assert torch.equal(totals[0].nan_to_num(7.0), totals[1].nan_to_num(7.0))
    assert largest == plain or (math.isnan(largest) and math.isnan(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_of_every_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    total = torch.empty(1000, dtype=torch.float64)
    assert exact.add_rounded(total, x, 2.0**-20, first=True) == x.abs().max().item()
    assert torch.equal(total, (x.double() * 2**20).round() / 2**20)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_survives(value: float) -> None:
    total = torch.zeros(3, dtype=torch.float64)
    largest = exact.add_rounded(total, torch.tensor([1.0, value, 2.0]), 2.0**-20, first=False)
    assert not math.isfinite(largest)
    assert total[0] == 1 and total[2] == 2 and not math.isfinite(total[1])


def test_the_grid_rises_at_once_and_falls_slowly() -> None:
    assert exact.next_top(None, 0.0) is None
    assert exact.next_top(None, 0.75) == 0
    assert exact.next_top(5, 0.75) == 4
    assert exact.next_top(5, 1000.0) == 10
    assert exact.next_top(5, 0.0) == 5


@given(top=st.integers(-100, 100), contributions=st.integers(1, 1 << 14))
def test_there_is_room_for_all_contributions(top: int, contributions: int) -> None:
    bits = exact.carry_bits(contributions)
    assert contributions * exact.limit(top) <= 2.0**53 * exact.spacing(top, bits)
    assert exact.limit(top) <= 2.0**51 * exact.spacing(top, bits)  # what the anchor can round
