"""The mixture of sources: exact shares everywhere, every sample of a source in its turn, sources that end."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipar.data.mix import Mixture

BOUND = 1.7
WEIGHTS = st.lists(st.integers(1, 1000) | st.floats(0.001, 1.0), min_size=1, max_size=9)


def counts_of(source: np.ndarray, num_sources: int) -> np.ndarray:
    """[n + 1, num_sources]: how many of the first n samples are of each source."""
    counts = np.zeros((source.size + 1, num_sources), np.int64)
    counts[1:] = (source[:, None] == np.arange(num_sources)).cumsum(axis=0)
    return counts


@given(weights=WEIGHTS, seed=st.integers(0, 2**32 - 1))
def test_every_beginning_has_the_shares_that_were_asked_for(weights: list[float], seed: int) -> None:
    mixture = Mixture(weights, [None] * len(weights))
    assert mixture.num_samples is None
    source, position = mixture.locate(np.arange(3000))
    counts = counts_of(source, len(weights))
    shares = np.array(weights) / sum(weights)
    assert np.abs(counts - np.arange(3001)[:, None] * shares).max() < BOUND
    assert np.allclose(mixture.shares, shares, rtol=1e-6)
    # A source's samples come one after the other.
    for number in range(len(weights)):
        assert position[source == number].tolist() == list(range(counts[-1, number]))
    # Far away, and in any order, it is the same function.
    some = np.random.default_rng(seed).integers(0, 3000, 50)
    assert np.array_equal(np.array(mixture.locate(some)), [source[some], position[some]])


@given(weights=WEIGHTS, first=st.integers(0, 2**50), length=st.integers(1, 2000))
def test_every_window_has_the_shares_that_were_asked_for(weights: list[float], first: int, length: int) -> None:
    source, position = Mixture(weights, [None] * len(weights)).locate(first + np.arange(length))
    total = sum(Fraction(str(weight)) for weight in weights)
    for number, weight in enumerate(weights):
        mine = position[source == number]
        share = Fraction(str(weight)) / total
        assert abs(mine.size - length * float(share)) < 2 * BOUND
        assert np.array_equal(np.diff(mine), np.ones(max(0, mine.size - 1)))
        if mine.size and sum(map(float, weights)) < 1e6:
            drift = (first + length) * 1e-8  # of weights that were rounded to parts in 2^30
            assert abs(mine[0] - float(share * first)) < 2 * BOUND + drift


def test_one_per_cent_over_long_windows() -> None:
    weights = [0.5, 0.3, 0.15, 0.04, 0.01]
    source, _ = Mixture(weights, [None] * 5).locate(10**12 + np.arange(100_000))
    for begin in (0, 12_345, 60_000):
        shares = np.bincount(source[begin : begin + 34_000], minlength=5) / 34_000
        assert np.abs(shares / weights - 1).max() < 0.01


@given(
    sources=st.lists(st.tuples(st.integers(1, 50), st.none() | st.integers(1, 300)), min_size=1, max_size=6),
)
def test_sources_end_and_the_others_share(sources: list[tuple[int, int | None]]) -> None:
    weights, limits = zip(*sources, strict=True)
    mixture = Mixture(weights, limits)
    endless = None in limits
    assert mixture.num_samples == (None if endless else sum(limits))
    length = 3000 if endless else sum(limits)
    source, position = mixture.locate(np.arange(length))
    counts = counts_of(source, len(weights))
    for number, limit in enumerate(limits):
        assert position[source == number].tolist() == list(range(counts[-1, number]))
        assert limit is None or counts[-1, number] <= limit
    # Between two endings those that are left have their shares.
    over = counts == [length + 1 if limit is None else limit for limit in limits]
    ends = (np.flatnonzero(over[1:].sum(axis=1) > over[:-1].sum(axis=1)) + 1).tolist()
    for begin, end in zip([0, *ends], [*ends, length], strict=True):
        left = [k for k in range(len(limits)) if counts[begin][k] != limits[k]]
        total = sum(weights[k] for k in left)
        for k in left:
            expected = (np.arange(begin, end + 1) - begin) * weights[k] / total
            assert np.abs(counts[begin : end + 1, k] - counts[begin, k] - expected).max() < BOUND


def test_weights_are_taken_as_they_are_written() -> None:
    source, _ = Mixture([0.7, 0.2, 0.1], [None] * 3).locate(np.arange(10_000))
    assert all(np.bincount(ten).tolist() == [7, 2, 1] for ten in source.reshape(-1, 10))


def test_weights_of_any_size() -> None:
    mixture = Mixture([1e-12, 1.0, 12345678901234567890], [None] * 3)
    assert mixture.locate(np.arange(2**62, 2**62 + 100))[0].tolist() == [2] * 100
    for weights in ([], [1.0, 0.0], [-1.0]):
        with pytest.raises(ValueError, match="all are positive"):
            Mixture(weights, [None] * len(weights))


def test_beyond_the_end() -> None:
    mixture = Mixture([1, 2], [3, 5])
    with pytest.raises(ValueError, match="samples 8 to 8 of a mixture of 8"):
        mixture.locate([8])
    with pytest.raises(ValueError, match="samples -1 to -1"):
        mixture.locate([-1])


def test_the_mixture_is_pinned() -> None:
    """A run that is resumed with another version must see the samples that it has not seen."""
    source, position = Mixture([5, 2, 1], [None, 4, None]).locate(np.arange(24))
    assert source.tolist() == [0, 1, 0, 2, 0, 0, 1, 0, 0, 1, 0, 2, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 2]
    assert position.tolist() == [0, 0, 1, 0, 2, 3, 1, 4, 5, 2, 6, 1, 7, 8, 3, 9, 10, 2, 11, 12, 13, 14, 15, 3]
