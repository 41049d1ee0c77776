"""Sums of small arrays over the ranks of a host, compiled: the steps in Python would take longer than all of it.

`SmallSum` is `shared.all_reduce_through_slots` with one meeting, and `SmallSumInPlace` is `shared.all_reduce` in the
arena, to the word and to the bit; meeting.c has the protocol.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, Protocol

from mpipar.comm.adding import Description, can_add, describe, pointers
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.call import Call
from mpipar.comm.host import SLOT_BYTES, Host
from mpipar.comm.p2p import chunk_bounds
from mpipar.comm.pending import Algorithm

_LARGEST_IN_PLACE_BYTES = 1 << 20  # above, adding takes so long that the Python around it is not seen


class Small(Protocol):
    """A planned sum."""

    def at_once(self) -> bool:
        """Does it if the others come within microseconds; whether they have. For a lane with nothing under way."""
        ...

    def rest(self) -> Algorithm:
        """What `at_once` has left to do."""
        ...

    def whole(self) -> Algorithm:
        """The sum as an algorithm like others, in which nothing waits by itself."""
        ...


class SmallSum:
    """Through slots. `plan_small_sum` makes it."""

    __slots__ = ("_bring", "_call", "_host", "_kept", "_take", "at_once")

    def __init__(self, host: Host, x: Buffer, call: Call):
        slots = [[(slot, 0) for slot in host.slots(x.dtype, turn)] for turn in (0, 1)]
        described = _Sum(
            host=_describe(host),
            call=(call.word, call.detail),
            num_bytes=x.size * x.itemsize,
            of_turn=tuple(describe([(x, 0)], of_turn, x.size) for of_turn in slots),
        )
        self._kept = described, x
        self._host = host
        self._call = call
        meeting, here = _compiled(), ctypes.addressof(described)
        self.at_once, self._bring, self._take = (
            partial(function, here) for function in (meeting.sum_at_once, meeting.bring, meeting.take)
        )

    def rest(self) -> Algorithm:
        yield from self._host.arrivals(self._call)
        self._take()

    def whole(self) -> Algorithm:
        self._bring()
        yield from self.rest()


class SmallSumInPlace:
    """In the arena. `plan_small_sum_in_place` makes it."""

    __slots__ = ("_add_chunk", "_begin", "_call", "_host", "_kept", "_to_leave")

    def __init__(self, host: Host, column: Sequence[Buffer], call: Call):
        mine = column[host.rank]
        a, b = chunk_bounds(mine.size, host.size)[host.rank : host.rank + 2]
        own_first = [(mine, a), *((buffer, a) for buffer in column if buffer is not mine)]
        described = _SumInPlace(
            host=_describe(host), call=(call.word, call.detail), of_chunk=describe(own_first, own_first, b - a)
        )
        self._kept = described, column
        self._host = host
        self._call = call
        self._to_leave = False  # and not still to come: what `at_once` was waiting for last
        meeting, here = _compiled(), ctypes.addressof(described)
        self._begin = partial(meeting.sum_in_place_at_once, here)
        self._add_chunk = partial(meeting.add_chunk, here)

    def at_once(self) -> bool:
        meetings: int = self._begin()
        self._to_leave = meetings == 1
        return meetings == 2

    def rest(self) -> Algorithm:
        if self._to_leave:
            yield from self._host.arrivals(None)
        else:
            yield from self._host.arrivals(self._call)
            self._add_chunk()
            yield from self._host.meet()

    def whole(self) -> Algorithm:
        yield from self._host.meet(self._call)
        self._add_chunk()
        yield from self._host.meet()


def plan_small_sum(host: Host, x: Buffer, op: Op, call: Call) -> Small | None:
    """The sum of x over the ranks of the host, through slots; None if this is not the way for it.

    Args:
        host: Where they meet.
        x: What this rank brings.
        op: The operation.
        call: What the rank has come for.
    """
    return SmallSum(host, x, call) if _suits(host, x, op, SLOT_BYTES) and x.is_in_place else None


def plan_small_sum_in_place(host: Host, column: Sequence[Buffer], op: Op, call: Call) -> Small | None:
    """The sum over what lies at one place of the arena; None if this is not the way for it.

    Args:
        host: Where the ranks meet.
        column: The array of each.
        op: The operation.
        call: What this rank has come for.
    """
    return SmallSumInPlace(host, column, call) if _suits(host, column[0], op, _LARGEST_IN_PLACE_BYTES) else None


def _suits(host: Host, x: Buffer, op: Op, most_bytes: int) -> bool:
    """Whether meeting.c can do it, and it is worth it."""
    fits = op == "sum" and can_add(x.dtype, x.dtype) and x.size * x.itemsize <= most_bytes
    return fits and host.meets_at_flags and is_built()


def is_built() -> bool:
    """Whether meeting.c was compiled."""
    return _compiled() is not None


class _Host(ctypes.Structure):
    """struct host of meeting.c."""

    _fields_ = (
        ("rank", ctypes.c_int64),
        ("num_ranks", ctypes.c_int64),
        ("lines", ctypes.POINTER(ctypes.c_void_p)),
    )


class _Sum(ctypes.Structure):
    """struct sum of meeting.c."""

    _fields_ = (
        ("host", _Host),
        ("call", ctypes.c_uint64 * 2),
        ("num_bytes", ctypes.c_int64),
        ("of_turn", Description * 2),
    )


class _SumInPlace(ctypes.Structure):
    """struct sum_in_place of meeting.c."""

    _fields_ = (
        ("host", _Host),
        ("call", ctypes.c_uint64 * 2),
        ("of_chunk", Description),
    )


@cache
def _compiled() -> Any:
    """meeting.c, each of whose functions takes the address of a description; None if it was not built."""
    try:
        return import_module("mpipar.comm._meeting")
    except ImportError:
        return None


def _describe(host: Host) -> _Host:
    return _Host(rank=host.rank, num_ranks=host.size, lines=pointers(host.addresses_of_lines()))
