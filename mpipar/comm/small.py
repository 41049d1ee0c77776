"""The sum of a small array over the ranks of a host, compiled: the steps in Python would take longer than all of it.

It is `shared.all_reduce_through_slots` with one meeting, to the word and to the bit; meeting.c has the protocol.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from mpipar import compiled
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.call import Call
from mpipar.comm.host import SLOT_BYTES, Host
from mpipar.comm.pending import Algorithm

_DTYPES = ("float32", "float64", "int32", "int64")  # in the order of meeting.c


class SmallSum:
    """A planned sum. `plan_small_sum` makes it.

    Attributes:
        at_once: Brings this rank's array, and takes the sum if the others come within microseconds; whether they have.
            For a lane in which nothing is under way.
    """

    __slots__ = ("_bring", "_call", "_host", "_kept", "_take", "at_once")

    def __init__(self, host: Host, x: Buffer, call: Call):
        described = _Sum(
            x=x.address,
            size=x.size,
            dtype=_DTYPES.index(x.dtype),
            call=(call.word, call.detail),
            rank=host.rank,
            num_ranks=host.size,
            lines=_pointers(host.addresses_of_lines()),
            slots=_pointers([slot.address for slot in host.slots("uint8", 0)]),
            slot_bytes=SLOT_BYTES,
        )
        self._kept = described, x
        self._host = host
        self._call = call
        here = ctypes.c_void_p(ctypes.addressof(described))
        self.at_once, self._bring, self._take = (partial(function, here) for function in _functions())

    def rest(self) -> Algorithm:
        """What `at_once` has left to do."""
        yield from self._host.arrivals(self._call)
        self._take()

    def whole(self) -> Algorithm:
        """The sum as an algorithm like others, in which nothing waits by itself."""
        self._bring()
        yield from self.rest()


def plan_small_sum(host: Host, x: Buffer, op: Op, call: Call) -> SmallSum | None:
    """The sum of x over the ranks of the host; None if this is not the way for it.

    Args:
        host: Where they meet.
        x: What this rank brings.
        op: The operation.
        call: What the rank has come for.
    """
    fits = op == "sum" and x.dtype in _DTYPES and x.size * x.itemsize <= SLOT_BYTES and x.is_in_place
    return SmallSum(host, x, call) if fits and host.meets_at_flags and compiled.is_built() else None


class _Sum(ctypes.Structure):
    """struct sum of meeting.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("call", ctypes.c_uint64 * 2),
        ("rank", ctypes.c_int64),
        ("num_ranks", ctypes.c_int64),
        ("lines", ctypes.POINTER(ctypes.c_void_p)),
        ("slots", ctypes.POINTER(ctypes.c_void_p)),
        ("slot_bytes", ctypes.c_int64),
    )


@lru_cache(maxsize=1)
def _functions() -> tuple[Any, Any, Any]:
    """(sum_at_once, bring, take) of meeting.c, which was built: each takes a `_Sum`."""
    at_once = compiled.function("sum_at_once", ctypes.c_bool, ctypes.c_void_p)
    bring, take = (compiled.function(name, None, ctypes.c_void_p) for name in ("bring", "take"))
    return at_once, bring, take


def _pointers(addresses: Sequence[int]) -> Any:
    return (ctypes.c_void_p * len(addresses))(*addresses)
