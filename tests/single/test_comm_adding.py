"""Sums over several arrays in one pass: numpy's bits, whatever the sizes, and wherever the arrays begin."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpipar import compiled
from mpipar.comm import adding, sums
from mpipar.comm.adding import plan_addition
from mpipar.comm.buffers import Buffer

pytestmark = pytest.mark.skipif(not compiled.is_built(), reason="adding.c was not built: no C compiler")

DTYPES = ["float32", "float64", "int32", "int64"]


def draw(size: int, dtype: str, seed: int) -> np.ndarray:
    """Numbers whose sum depends on the order of addition, or overflows; with some that are not finite, and zeros."""
    rng = np.random.default_rng(seed)
    if dtype.startswith("int"):
        return rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, size, dtype)
    values = rng.standard_normal(size) * 10.0 ** rng.integers(-30, 30, size)
    special = rng.choice([np.inf, -np.inf, np.nan, 0.0, -0.0, 3e38], size)
    return np.where(rng.random(size) < 0.1, special, values).astype(dtype)


def assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    """Zeros with their sign; but one NaN is as good as another: which one survives a sum is the compiler's choice."""
    assert found.dtype == wanted.dtype
    if found.dtype.kind == "f":
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        found, wanted = (np.where(np.isnan(wanted), 0, x).astype(x.dtype) for x in (found, wanted))
    np.testing.assert_array_equal(found.view(f"u{found.itemsize}"), wanted.view(f"u{wanted.itemsize}"))


@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(0, 200),
    starts=st.lists(st.integers(0, 9), min_size=1, max_size=16),
    num_targets=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
def test_the_bits_of_numpy(dtype: str, size: int, starts: list[int], num_targets: int, seed: int) -> None:
    arrays = [draw(size + 20, dtype, seed + i) for i in range(max(len(starts), num_targets))]
    before = [array.copy() for array in arrays]
    sources = [(Buffer(array), start) for array, start in zip(arrays, starts, strict=False)]
    # The first are sources too, at the same place, as they are in the arena.
    places = [*sources, *((Buffer(array), 3) for array in arrays[len(sources) :])][:num_targets]
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = before[0][starts[0] : starts[0] + size].copy()
        for array, start in zip(before[1:], starts[1:], strict=False):
            wanted += array[start : start + size]
    addition = plan_addition(places, sources, size)
    assert addition is not None
    addition()
    for i, (array, old) in enumerate(zip(arrays, before, strict=True)):
        if i < num_targets:
            start = places[i][1]
            old[start : start + size] = wanted
        assert_same_bits(array, old)  # and nothing beside it


@given(size=st.integers(0, 100), num=st.integers(1, 9), seed=st.integers(0, 1000))
def test_doubles_are_converted_once(size: int, num: int, seed: int) -> None:
    arrays = [draw(size, "float64", seed + i) for i in range(num)]
    targets = [np.empty(size, np.float32) for _ in range(3)]
    addition = plan_addition([(Buffer(x), 0) for x in targets], [(Buffer(x), 0) for x in arrays], size)
    assert addition is not None
    addition()
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = arrays[0].copy()
        for array in arrays[1:]:
            wanted += array
        for target in targets:
            assert_same_bits(target, wanted.astype(np.float32))


@pytest.mark.parametrize("num", [1, 2, 5])
def test_with_and_without(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    """What sums.py plans comes to the same bits where nothing was compiled."""
    found = []
    for planner in (plan_addition, lambda *_: None):
        monkeypatch.setattr(sums, "plan_addition", planner)
        floats = [Buffer(draw(300_001, "float32", i)) for i in range(num)]
        places = [(x, 5) for x in floats]
        sums.run(sums.plan_sum(places[0], places, 299_990, "sum", num, into=floats[1:]))
        doubles = [Buffer(draw(300_001, "float64", i)) for i in range(num)]
        targets = [Buffer(np.zeros(300_001, np.float32)) for _ in range(num)]
        sums.run(sums.plan_sum_into(targets, doubles, 7, 299_990))
        found.append([x.values for x in (*floats, *doubles, *targets)])
    for compiled_way, plain_way in zip(*found, strict=True):
        assert_same_bits(compiled_way, plain_way)


def test_what_is_left_to_others() -> None:
    """Floats of 16 bits, which are summed in 32; and more arrays than are read well side by side."""
    for dtype in (torch.bfloat16, torch.float16):
        x = Buffer(torch.zeros(4, dtype=dtype))
        assert plan_addition([(x, 0)], [(x, 0)], 4) is None
    many = [(Buffer(np.zeros(4)), 0)] * (adding.MOST_SOURCES + 1)
    assert plan_addition(many[:1], many, 4) is None


def test_a_plan_keeps_its_arrays() -> None:
    array = np.ones(4)
    alive = weakref.ref(array)
    buffer = Buffer(array)
    addition = plan_addition([(buffer, 0)], [(buffer, 0), (buffer, 0)], 4)
    del array, buffer
    assert addition is not None
    addition()
    assert alive() is not None
    assert alive().tolist() == [2.0] * 4  # type: ignore[union-attr]
