"""Sums that do not depend on the order of addition: doubles that never round.

A double holds 53 bits. If all that is added up lies on one grid, the multiples of some power of two, and no sum can be
larger than 2^53 spacings of it, then every partial sum is a multiple too, is held exactly, and no addition rounds.
Addition is then associative: any order, grouping, algorithm and number of ranks gives the same bits. All that is left
of rounding happens before, once, to each contribution by itself:

    anchor = 1.5 * 2^52 * spacing         its last bit is worth one spacing
    rounded = (x + anchor) - anchor       x on the grid, to the nearest, ties to even

The grid of a tensor follows what its contributions were in the steps before (`next_top`):

    2^53 spacings    ^  room for the sum of 2^bits contributions
    limit            |  ROOM: how much larger than expected a contribution may be
    top              |  the largest contribution is expected below 2^top
                     |  45 - bits: what is kept of it; float32 has 24
    spacing          v

A contribution above the limit would break the promise. It is seen by its own size alone, never in a partial sum, so all
ranks, however many they are, come to the same verdict: the step is done again on a coarser grid. NaN and infinity need
no flags of their own: they survive rounding and any order of additions.

Demmel & Nguyen, "Fast Reproducible Floating-Point Summation", ARITH 2013: pre-rounding. docs/exact.md has an example.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from mpipar import compiled

ROOM = 8
"""How many times, as a power of two, a contribution may be larger than the largest one expected."""

FIRST_TOP = 12
"""Of a tensor of which nothing but zeros has been seen. Gradients of a sum over tokens are far below."""

_MANTISSA = 53
_RUN = 1 << 16  # elements: what lies between two passes is still in a core's cache


def carry_bits(contributions: int) -> int:
    """Bits for the sum of so many contributions. Two at least, so that the anchor's exponent is that of every sum."""
    return max(2, math.ceil(math.log2(contributions)))


def spacing(top: int, bits: int) -> float:
    """Of the grid for contributions that are expected below 2^top, 2^bits of them at most."""
    return 2.0 ** (top + ROOM + bits - _MANTISSA)


def anchor(spacing: float) -> float:
    """What a contribution is added to, and freed of again, to be rounded onto a grid."""
    return 1.5 * 2.0 ** (_MANTISSA - 1) * spacing


def limit(top: int) -> float:
    """The largest contribution that such a grid can take."""
    return 2.0 ** (top + ROOM)


def next_top(top: int | None, largest: float) -> int | None:
    """The top of the next step's grid.

    It rises at once and falls slowly, so that one quiet step does not make the next one overflow.

    Args:
        top: Of this step's grid; None if nothing but zeros has been seen of the tensor.
        largest: The largest contribution of the step, over all ranks.
    """
    if largest == 0:
        return top
    exponent = math.frexp(largest)[1]
    return exponent if top is None else max(exponent, top - 1)


def add_rounded(total: Tensor, x: Tensor, spacing: float, *, first: bool) -> float:
    """total becomes x, or its sum with x, rounded to the grid.

    Args:
        total: [n] float64, contiguous, on the grid.
        x: [n] of any floating-point dtype, contiguous.
        spacing: Of the grid.
        first: Whether x is the first contribution, and total may hold anything.

    Returns:
        The largest |x|, or NaN if an element is: above `limit`, the total is good for nothing.
    """
    base = anchor(spacing)
    functions = _functions()
    if functions is not None and x.dtype == torch.float32:
        return functions[first](total.data_ptr(), x.data_ptr(), x.numel(), base)
    largest = 0.0
    if x.numel() == 0:
        return largest
    for rounded_into, run in zip(total.split(_RUN), x.split(_RUN), strict=True):
        rounded = rounded_into if first else torch.empty_like(rounded_into)
        rounded.copy_(run).add_(base).sub_(base)
        if not first:
            rounded_into.add_(rounded)
        here = run.abs().max().item()
        largest = here if here > largest or math.isnan(here) else largest
    return largest


@lru_cache(maxsize=1)
def _functions() -> tuple[Callable[..., float], Callable[..., float]] | None:
    """(add, round) of rounding.c, if it was built."""
    types = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_double
    add, only_round = (compiled.function(name, ctypes.c_float, *types) for name in ("round_and_add", "round"))
    return None if add is None or only_round is None else (add, only_round)
