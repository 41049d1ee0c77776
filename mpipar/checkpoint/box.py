"""A box: the part of a tensor that starts here, and extends so far, along each of its dimensions.

Every way of cutting a tensor makes boxes: rows for column-parallel weights, columns for row-parallel ones, runs of rows
for ZeRO and for replicas that share the work of writing. Arithmetic only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

Index = tuple[Any, ...]
"""Slices and numbers, and ... at the end: so it gives a view, also of a single element."""


@dataclass(frozen=True)
class Box:
    """A part of a tensor.

    Args:
        start: Its first index along each dimension.
        extent: Its shape.
    """

    start: tuple[int, ...]
    extent: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        return math.prod(self.extent)

    @property
    def index(self) -> Index:
        """What cuts it out of its tensor: tensor[box.index]."""
        sides = zip(self.start, self.extent, strict=True)
        return (*(slice(first, first + count) for first, count in sides), ...)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it lies within a tensor of this shape."""
        return len(shape) == len(self.start) == len(self.extent) and all(
            first >= 0 and count >= 0 and first + count <= room
            for first, count, room in zip(self.start, self.extent, shape, strict=True)
        )

    def common(self, other: Box) -> Box:
        """What both hold; of size 0 if that is nothing."""
        start = tuple(map(max, self.start, other.start))
        ends = [
            min(a + m, b + n) for a, m, b, n in zip(self.start, self.extent, other.start, other.extent, strict=True)
        ]
        return Box(start, tuple(max(0, end - first) for first, end in zip(start, ends, strict=True)))

    def within(self, other: Box) -> Box:
        """The same place, counted from where `other` starts."""
        return Box(tuple(a - b for a, b in zip(self.start, other.start, strict=True)), self.extent)

    @property
    def num_rows(self) -> int:
        """Into how many equal runs of memory it can be cut, if it is laid out by itself: along its first long side."""
        return next((count for count in self.extent if count != 1), 1)

    def rows(self, first: int, last: int) -> Box:
        """Those of the rows: a box that lies in one piece in the memory of this one."""
        side = next((i for i, count in enumerate(self.extent) if count != 1), None)
        if side is None:
            assert (first, last) == (0, 1)
            return self
        start, extent = list(self.start), list(self.extent)
        start[side] += first
        extent[side] = last - first
        return Box(tuple(start), tuple(extent))

    def __str__(self) -> str:
        """As it is written in Python: [0:64,128:256]."""
        sides = (f"{first}:{first + count}" for first, count in zip(self.start, self.extent, strict=True))
        return f"[{','.join(sides)}]"


@dataclass(frozen=True)
class Read:
    """One read of a box from an array in C order.

    Args:
        begin: The first element, by its number in the array,
        end: and the one behind the last.
        shape: Of what is read,
        index: and what of it belongs to the box.
        into: Where in the box.
    """

    begin: int
    end: int
    shape: tuple[int, ...]
    index: Index
    into: Index


def reads(shape: Sequence[int], box: Box, gap: int, most: int) -> Iterator[Read]:
    """How to read a box of an array with few reads, and without much that is not asked for.

    Args:
        shape: Of the array.
        box: A part of it.
        gap: Elements that are read along rather than left out: as many as come anyway, with a block.
        most: Elements of one read, if its rows are not longer.
    """
    if box.size == 0:
        return
    if not shape:
        yield Read(0, 1, (), (...,), (...,))
        return
    row, inner = math.prod(shape[1:]), Box(box.start[1:], box.extent[1:])
    first, last = box.start[0], box.start[0] + box.extent[0]
    if row <= gap or inner == Box.whole(shape[1:]):
        rows = max(1, most // max(1, row))
        for begin in range(first, last, rows):
            end = min(begin + rows, last)
            into = slice(begin - first, end - first)
            yield Read(begin * row, end * row, (end - begin, *shape[1:]), (slice(None), *inner.index), (into, ...))
        return
    for i in range(first, last):
        for read in reads(shape[1:], inner, gap, most):
            yield replace(read, begin=i * row + read.begin, end=i * row + read.end, into=(i - first, *read.into))
