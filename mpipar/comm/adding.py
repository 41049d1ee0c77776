"""Sums over several arrays in one pass over memory, compiled: comm/adding.c.

numpy adds two arrays at a time. Over n arrays it passes n - 1 times over the sum so far, and reads one or two arrays of
memory at once; the loop here reads all n side by side, and writes the sum where it is wanted while it is in a register.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from mpipar import compiled
from mpipar.comm.buffers import Buffer

Place = tuple[Buffer, int]
"""An array, and the first of its elements that are meant."""

# (of the sources, of the targets), in the order of adding.h
_KINDS = (
    ("float32", "float32"),
    ("float64", "float64"),
    ("int32", "int32"),
    ("int64", "int64"),
    ("float64", "float32"),
)
MOST_SOURCES = 16
"""More streams of memory than these no processor fetches ahead: a run at a time takes less time then."""


class Description(ctypes.Structure):
    """struct addition of adding.h. `describe` makes it."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("num_sources", ctypes.c_int64),
        ("num_targets", ctypes.c_int64),
        ("sources", ctypes.POINTER(ctypes.c_void_p)),
        ("targets", ctypes.POINTER(ctypes.c_void_p)),
    )


class Addition:
    """A planned sum. `plan_addition` makes it."""

    __slots__ = ("_add_up", "_described", "_kept")

    def __init__(self, add_up: Callable[..., None], described: Description, kept: Sequence[Place]):
        self._add_up = add_up
        self._described = described
        self._kept = kept

    def __call__(self) -> None:
        """Adds up. Other threads of this process run meanwhile."""
        self._add_up(self._described)


def plan_addition(targets: Sequence[Place], sources: Sequence[Place], size: int) -> Addition | None:
    """All targets become the sum of the sources, in their order; None if this is not the way for it.

    Args:
        targets: Of one dtype; they may be sources.
        sources: Of one dtype.
        size: Elements.
    """
    add_up = _function()
    if add_up is None or not can_add(sources[0][0].dtype, targets[0][0].dtype) or len(sources) > MOST_SOURCES:
        return None
    return Addition(add_up, describe(targets, sources, size), [*targets, *sources])


def can_add(dtype: str, into: str) -> bool:
    """Whether arrays of a dtype can be added up into one of another."""
    return (dtype, into) in _KINDS


def kind_of(dtype: str, into: str) -> int:
    """What adding.h calls sums of arrays of a dtype into one of another."""
    return _KINDS.index((dtype, into))


def describe(targets: Sequence[Place], sources: Sequence[Place], size: int) -> Description:
    """What `plan_addition` takes, as C takes it. It does not keep the arrays alive."""
    return Description(
        kind=kind_of(sources[0][0].dtype, targets[0][0].dtype),
        size=size,
        num_sources=len(sources),
        num_targets=len(targets),
        sources=pointers(_addresses(sources)),
        targets=pointers(_addresses(targets)),
    )


def pointers(addresses: Sequence[int]) -> Any:
    """An array of them, as a field of a structure takes and keeps it."""
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _addresses(places: Sequence[Place]) -> list[int]:
    return [buffer.address + start * buffer.itemsize for buffer, start in places]


@lru_cache(maxsize=1)
def _function() -> Callable[..., None] | None:
    return compiled.function("add_up", None, ctypes.POINTER(Description))
