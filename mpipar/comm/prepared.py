"""Operations that are called again with the same tensor, as a training step does: prepared once, looked up after.

Checking an array, finding it in the arena and choosing an algorithm take longer than to add up a few thousand elements.
What was prepared is forgotten with its tensor, or when the tensor has other memory or another layout.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpipar.comm.call import Call
from mpipar.comm.one_call import OneCall
from mpipar.comm.p2p import Wire
from mpipar.comm.pending import Algorithm


@dataclass(frozen=True, slots=True)
class Operation:
    """One rank's part in a collective, ready to begin.

    Args:
        call: What was called.
        begin: The algorithm, if it sends no messages.
        send: The algorithm, given the wire of the collective, if it does.
        one_call: The same as `begin`, for a rank that has nothing else under way and waits for it.
        keeps: What lives as long as this does.
    """

    call: Call
    begin: Callable[[], Algorithm] | None = None
    send: Callable[[Wire], Algorithm] | None = None
    one_call: OneCall | None = None
    keeps: object = None

    def followed_by(self, last: Callable[[], Algorithm | None]) -> Operation:
        """The same, with something to do on this rank when the algorithm is through; it may have to wait for it."""
        begin, send = self.begin, self.send
        if begin is not None:
            # The one call knows nothing of what follows.
            return replace(self, begin=lambda: _then(begin(), last), one_call=None)
        assert send is not None
        return replace(self, send=lambda wire: _then(send(wire), last))


def _then(algorithm: Algorithm, last: Callable[[], Algorithm | None]) -> Algorithm:
    yield from algorithm
    yield from last() or ()


class Prepared:
    """The prepared operations of one communicator."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str, str], tuple[Operation, int, int, torch.dtype, weakref.ref[Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, x: Any, op: str, how: str) -> Operation | None:
        """What was prepared for this tensor as it is, this operation, and this algorithm."""
        entry = self._entries.get((id(x), op, how))
        if entry is None:
            return None
        # An entry goes with its tensor, so this is it; but it may have been given other memory or another layout.
        operation, address, elements, dtype, _ = entry
        if x.data_ptr() == address and x.numel() == elements and x.dtype is dtype and x.is_contiguous():
            return operation
        return None

    def keep(self, x: object, op: str, how: str, operation: Operation) -> None:
        """Keeps it as long as the tensor lives. With a numpy array the operation would keep the array alive itself."""
        if isinstance(x, Tensor) and x.device.type == "cpu" and x.is_contiguous() and not x.is_neg():
            key = id(x), op, how
            reference = weakref.ref(x, lambda _: self._entries.pop(key, None))
            self._entries[key] = operation, x.data_ptr(), x.numel(), x.dtype, reference

    def clear(self) -> None:
        """Forgets all: other algorithms can be used now."""
        self._entries.clear()
