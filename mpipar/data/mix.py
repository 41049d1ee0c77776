"""How several sources are mixed: which sample of which source has a given global index. Computed, not stored.

Each source has a weight. The sources are the leaves of Huffman's tree of their weights, and at every fork the first n
samples that come by are shared by rounding: round(n w_left / w) of them go left, the others right. So how many of the
first n samples are of a source is known at once for any n, and each sample of a source is followed by the next one.

Bound: of any first n samples a source has its exact share n w / W to within 1.7 samples. A fork is off by 1/2, and
hands down what it was off itself in proportion: 1/2 (1 + w/w' + w/w'' + ...), w', w'' being the weights of the forks
above a leaf, which in Huffman's tree grow as the Fibonacci numbers 1, 2, 3, 5 do; so less than half the sum of their
reciprocals, 3.36. Any window of samples is the difference of two such beginnings.

A source may end. Then those that are left share by their weights: a new tree, from that index on.

D. Huffman: A method for the construction of minimum-redundancy codes. Proceedings of the IRE, 1952.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Places = NDArray[np.int64]
Number = TypeVar("Number", int, Places)

_MOST_PARTS = 1 << 30  # so that their products are less than 2^63


class Mixture:
    """Which source the sample with a given global index is of, and which of that source's samples it is.

    Args:
        weights: Of the sources, positive; taken as they are written, so that 0.1 is a tenth, and rounded to parts in
            2^30 where whole numbers would be larger.
        limits: After how many samples each source ends; None for never.

    Attributes:
        num_samples: After how many samples the last source has ended; None if one of them never does.
        shares: The part that each source has while all last.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]):
        parts = _whole_numbers(weights)
        self.shares = [part / sum(parts) for part in parts]
        self.num_samples: int | None = None
        self._phases: list[_Phase] = []
        start, given = 0, [0] * len(parts)
        left = [source for source, limit in enumerate(limits) if limit != 0]
        while left:
            tree = _huffman([(parts[source], source) for source in left])
            self._phases.append(_Phase(start, np.array(given, np.int64), tree))
            ends = [_ending(tree, source, limit - given[source]) for source in left if (limit := limits[source])]
            if not ends:
                break
            start += min(ends)
            for source, count in tree.counts(min(ends)):
                given[source] += count
            left = [source for source in left if given[source] != limits[source]]
        else:
            self.num_samples = start
        self._starts = np.array([phase.start for phase in self._phases], np.int64)

    def locate(self, index: ArrayLike) -> tuple[Places, Places]:
        """(source, how many samples of that source come before) of the samples with these indices, [n] each."""
        flat = np.asarray(index, np.int64).reshape(-1)
        if flat.size and not (flat.min() >= 0 and (self.num_samples is None or flat.max() < self.num_samples)):
            raise ValueError(f"samples {flat.min()} to {flat.max()} of a mixture of {self.num_samples}")
        source, position = np.empty_like(flat), np.empty_like(flat)
        of_phase = self._starts.searchsorted(flat, side="right") - 1
        for number in np.unique(of_phase).tolist():
            phase, chosen = self._phases[number], of_phase == number
            source[chosen], position[chosen] = phase.tree.locate(flat[chosen] - phase.start)
            position[chosen] += phase.given[source[chosen]]
        return source, position


@dataclass(frozen=True)
class _Tree:
    """A leaf, which is a source, or a fork."""

    weight: int
    source: int = -1
    children: tuple[_Tree, ...] = ()

    def locate(self, index: Places) -> tuple[Places, Places]:
        """(source, position in it) of the samples with these indices among all that come by here, [n] each."""
        if not self.children:
            return np.full_like(index, self.source), index
        went_left = self._left(index)
        goes_left = self._left(index + 1) > went_left
        source, position = np.empty_like(index), np.empty_like(index)
        for child, chosen, before in zip(
            self.children, (goes_left, ~goes_left), (went_left, index - went_left), strict=True
        ):
            source[chosen], position[chosen] = child.locate(before[chosen])
        return source, position

    def counts(self, n: int) -> list[tuple[int, int]]:
        """(source, how many of the first n samples are of it) of all below."""
        if not self.children:
            return [(self.source, n)]
        went_left = self._left(n)
        return self.children[0].counts(went_left) + self.children[1].counts(n - went_left)

    def _left(self, n: Number) -> Number:
        """How many of the first n samples go left: n part / whole, rounded."""
        part, whole = self.children[0].weight, self.weight
        cycles, rest = n // whole, n % whole
        return cycles * part + (2 * rest * part + whole) // (2 * whole)


@dataclass(frozen=True)
class _Phase:
    """From sample `start` on, when each source has given so many, all that are left are in `tree`."""

    start: int
    given: Places
    tree: _Tree


def _huffman(weighted: Sequence[tuple[int, int]]) -> _Tree:
    """The tree of (weight, source)."""
    heap = [(weight, number, _Tree(weight, source)) for number, (weight, source) in enumerate(weighted)]
    heapq.heapify(heap)
    for number in range(len(heap), 2 * len(heap) - 1):
        (one, _, lighter), (other, _, heavier) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (one + other, number, _Tree(one + other, children=(lighter, heavier))))
    return heap[0][2]


def _ending(tree: _Tree, source: int, count: int) -> int:
    """After how many samples there were `count` of the source."""
    weight = dict(_leaves(tree))[source]
    beyond = (count + 2) * tree.weight // weight + 1  # by the bound
    return bisect_left(range(beyond), count, key=lambda n: dict(tree.counts(n))[source])


def _leaves(tree: _Tree) -> list[tuple[int, int]]:
    if not tree.children:
        return [(tree.source, tree.weight)]
    return [leaf for child in tree.children for leaf in _leaves(child)]


def _whole_numbers(weights: Sequence[float]) -> list[int]:
    """Numbers in the same proportion, their sum at most 2^30 or so."""
    exact = [Fraction(str(weight)) for weight in weights]
    if not exact or min(exact) <= 0:
        raise ValueError(f"weights {list(weights)}: there is at least one, and all are positive")
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    total = sum(whole)
    if total // gcd(*whole) > _MOST_PARTS:
        return [max(1, round(Fraction(_MOST_PARTS * part, total))) for part in whole]
    return [part // gcd(*whole) for part in whole]
