"""The order of samples: a bijection every epoch, well mixed, and the same however it is asked for."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipar.data.order import KeyedPermutation, SampleOrder
from mpipar.errors import DataError

SEEDS = st.integers(0, 2**63 - 1)
SHARD_SIZES = st.lists(st.integers(0, 400), min_size=1, max_size=6)


def image(size: int, seed: int, epoch: int) -> np.ndarray:
    permutation = KeyedPermutation(size, seed)
    return permutation(np.arange(size, dtype=np.uint64), np.full(size, epoch, np.uint64))


@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(image(size, seed, epoch)), np.arange(size))


@given(sizes=SHARD_SIZES, seq_len=st.integers(1, 50), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_window_once_an_epoch(sizes: list[int], seq_len: int, seed: int, epoch: int) -> None:
    windows = {(s, offset) for s, size in enumerate(sizes) for offset in range(0, size - 1, seq_len)}
    if not windows:
        with pytest.raises(DataError, match="there is no token to predict"):
            SampleOrder(sizes, seq_len, seed)
        return
    order = SampleOrder(sizes, seq_len, seed)
    assert order.num_samples == len(windows)
    shard, offset = order.locate(np.arange(order.num_samples) + epoch * order.num_samples)
    located = list(zip(shard.tolist(), offset.tolist(), strict=True))
    assert len(located) == len(windows)
    assert set(located) == windows
    # Every token but the first of a shard is predicted once.
    predicted = sorted((s, at + 1 + t) for s, at in located for t in range(min(seq_len, sizes[s] - 1 - at)))
    assert predicted == [(s, t) for s, size in enumerate(sizes) for t in range(1, size)]


@given(sizes=SHARD_SIZES.filter(lambda sizes: max(sizes) > 8), seed=SEEDS, num_ranks=st.integers(1, 9))
def test_order_does_not_depend_on_who_asks(sizes: list[int], seed: int, num_ranks: int) -> None:
    order = SampleOrder(sizes, 7, seed)
    index = np.arange(3 * order.num_samples)
    shard, offset = order.locate(index)
    for rank in range(num_ranks):
        own = SampleOrder(sizes, 7, seed).locate(index[rank::num_ranks])
        assert np.array_equal(own, [shard[rank::num_ranks], offset[rank::num_ranks]])
    one = order.locate(int(index[-1]))
    assert (one[0].shape, int(one[0]), int(one[1])) == ((), shard[-1], offset[-1])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tiny_sets_see_every_permutation_equally_often(size: int) -> None:
    num_draws = 500 * math.factorial(size)
    seen = Counter(tuple(image(size, draw, epoch).tolist()) for draw in range(num_draws // 10) for epoch in range(10))
    counts = np.array([seen[permutation] for permutation in itertools.permutations(range(size))])
    # Chi-squared with size! - 1 degrees of freedom, more than 5 standard deviations off with a chance below 1e-4.
    degrees = counts.size - 1
    assert ((counts - 500) ** 2 / 500).sum() < degrees + 5 * math.sqrt(2 * degrees) + 5


@pytest.mark.parametrize("epoch", [0, 1, 12345])
def test_large_sets_are_mixed(epoch: int) -> None:
    size, bins = 100_003, 64
    places = image(size, 5, epoch).astype(np.int64)
    for part in np.array_split(places, bins):  # any stretch of the order visits all parts of the set alike
        counts = np.bincount(part * bins // size, minlength=bins)
        expected = part.size / bins
        assert ((counts - expected) ** 2 / expected).sum() < bins + 6 * math.sqrt(2 * bins)
    steps = np.diff(places)
    assert len(np.unique(steps)) > size / 3  # neighbours are not moved together
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02


def test_epochs_and_seeds_differ() -> None:
    orders = [image(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 20  # 1 is expected by chance


def test_sizes_beyond_memory() -> None:
    order = SampleOrder([10**15, 10**14], 1, 3)
    index = np.arange(10_000) * 7 + 10**14
    shard, offset = order.locate(index)
    assert len(set(zip(shard.tolist(), offset.tolist(), strict=True))) == index.size
    assert 0.85 < (shard == 0).mean() < 0.96


def test_indices_count_from_zero() -> None:
    with pytest.raises(ValueError, match="counts from 0"):
        SampleOrder([100], 10, 0).locate([-1])


def test_order_is_pinned() -> None:
    """A run that is resumed with another version must see the samples that it has not seen."""
    shard, offset = SampleOrder([1000, 50, 3000], 8, 1234).locate([0, 1, 2, 506, 507, 10**9])
    assert shard.tolist() == [1, 2, 2, 2, 0, 2]
    assert offset.tolist() == [24, 920, 856, 1416, 96, 1944]
