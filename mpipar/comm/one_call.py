"""Sums over the ranks of a host in one compiled call: steps of Python take as long as a small sum, or as copying a
quarter of a block of a large one.

`SumThroughSlots` is `shared.all_reduce_through_slots`, and `SumInPlace` is `shared.all_reduce` in the arena, to the
word and to the bit; meeting.c has the protocol.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, Protocol

from mpipar.comm.adding import MOST_SOURCES, Description, can_add, describe, kind_of, pointers
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.call import Call
from mpipar.comm.host import SLOT_BYTES, Host
from mpipar.comm.p2p import chunk_bounds
from mpipar.comm.pending import Algorithm, Pending
from mpipar.comm.shared import takes_one_meeting

_VERSION = 3  # of meeting.c
# Above, adding up in place takes so long that the Python around it is not seen.
_LARGEST_IN_PLACE_BYTES = 1 << 20


class OneCall(Protocol):
    """A planned sum."""

    def at_once(self) -> bool:
        """Does it if the others come within microseconds; whether it is done. For a lane with nothing under way."""
        ...

    def rest(self) -> Algorithm:
        """What `at_once` has left to do."""
        ...

    def whole(self) -> Algorithm:
        """The sum as an algorithm like others, in which nothing waits by itself."""
        ...


class SumThroughSlots:
    """Of an array in any memory. To be done at once it must lie in place.

    Args:
        host: Where the ranks meet.
        x: What this rank brings.
        call: What it has come for.
    """

    __slots__ = ("_begin", "_call", "_go_on", "_host", "_poll", "_state", "_x", "at_once")

    def __init__(self, host: Host, x: Buffer, call: Call):
        self._state = _SumThroughSlots(
            host=_describe(host),
            call=(call.word, call.detail),
            kind=kind_of(x.dtype, x.dtype),
            itemsize=x.itemsize,
            size=x.size,
            slot_size=SLOT_BYTES // x.itemsize,
            meetings=1 if takes_one_meeting(host, x) else 2,
            x=x.address,
            slots=tuple(pointers([slot.address for slot in host.slots(x.dtype, turn)]) for turn in (0, 1)),
            sources=pointers([0] * host.size),
        )
        self._x = x
        self._host = host
        self._call = call
        meeting, here = _compiled(), ctypes.addressof(self._state)
        # Itself, and no method around it, which would take as long as the rest of a small sum.
        self.at_once: Callable[[], bool] = partial(meeting.sum_through_slots, here)
        self._go_on: Callable[[], bool] = partial(meeting.go_on_through_slots, here)
        self._begin: Callable[[], bool] = partial(meeting.begin_through_slots, here)
        self._poll: Callable[[], bool] = partial(meeting.poll_through_slots, here)

    def rest(self) -> Algorithm:
        yield from self._arrivals()
        while not self._go_on():
            yield from self._arrivals()
        self._x.commit()

    def whole(self) -> Algorithm:
        done = self._begin()
        while not done:
            yield from self._arrivals()
            done = self._poll()
        self._x.commit()

    def _arrivals(self) -> Iterable[Pending]:
        """At the meeting that it waits for: the first compares what the ranks have come for."""
        is_first = self._state.at == 0 and self._state.met == 0
        return self._host.arrivals(self._call if is_first else None)


class SumInPlace:
    """Of what lies at one place of the arena. `plan_sum_in_place` makes it."""

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
        self._begin = partial(meeting.sum_in_place, here)
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


def can_sum_through_slots(host: Host, x: Buffer, op: Op) -> bool:
    """Whether `SumThroughSlots` makes it. Where all ranks have meeting.c, all that call the same come to the same."""
    few = host.size <= MOST_SOURCES or x.size * x.itemsize <= SLOT_BYTES  # what is small lies in caches
    return few and x.is_in_host_memory and _can(host, x, op)


def plan_sum_in_place(host: Host, column: Sequence[Buffer], op: Op, call: Call) -> OneCall | None:
    """The sum over what lies at one place of the arena; None if this is not the way for it.

    Args:
        host: Where the ranks meet.
        column: The array of each.
        op: The operation.
        call: What this rank has come for.
    """
    x = column[0]
    small = x.size * x.itemsize <= _LARGEST_IN_PLACE_BYTES
    return SumInPlace(host, column, call) if small and is_built() and _can(host, x, op) else None


def _can(host: Host, x: Buffer, op: Op) -> bool:
    """Whether meeting.c can add up what x is one of."""
    return op == "sum" and can_add(x.dtype, x.dtype) and host.meets_at_flags


def is_built() -> bool:
    """Whether meeting.c was compiled, and no older one."""
    return _compiled() is not None


class _Host(ctypes.Structure):
    """struct host of meeting.c."""

    _fields_ = (
        ("rank", ctypes.c_int64),
        ("num_ranks", ctypes.c_int64),
        ("lines", ctypes.POINTER(ctypes.c_void_p)),
        ("spins", ctypes.c_int64),
    )


class _SumThroughSlots(ctypes.Structure):
    """struct sum_through_slots of meeting.c."""

    _fields_ = (
        ("host", _Host),
        ("call", ctypes.c_uint64 * 2),
        ("kind", ctypes.c_int64),
        ("itemsize", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("slot_size", ctypes.c_int64),
        ("meetings", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("slots", ctypes.POINTER(ctypes.c_void_p) * 2),
        ("sources", ctypes.POINTER(ctypes.c_void_p)),
        ("at", ctypes.c_int64),
        ("met", ctypes.c_int64),
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
        module = import_module("mpipar.comm._meeting")
    except ImportError:
        return None
    return module if getattr(module, "VERSION", None) == _VERSION else None


def _describe(host: Host) -> _Host:
    return _Host(rank=host.rank, num_ranks=host.size, lines=pointers(host.addresses_of_lines()), spins=host.spins)
