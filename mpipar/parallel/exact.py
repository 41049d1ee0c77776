"""Gradients summed without rounding: the same bits for any number of ranks, whoever computes which microbatch.

Each gradient that a microbatch brings is rounded once, onto the grid of its tensor, and added to doubles that never
round (comm/exact). What the optimizer sees is their sum over all ranks, converted at the end.

    param.grad of a microbatch    float32     rounded in, dropped
    totals                        float64     on the grid; reduced
    flat, and param.grad          float32     what comes out

A grid belongs to a named tensor, never to a bucket or shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpipar.comm import Communicator, Work
from mpipar.comm.exact import FIRST_TOP, carry_bits, limit, next_top, spacing
from mpipar.parallel.buckets import Allocate, Bucket, Members, Slot, build_bucket
from mpipar.parallel.ledger import Ledger, open_ledger

_USES = 2  # of a weight in one microbatch, each rounded by itself: a tied embedding


class Grids:
    """The grid of each tensor in the coming step. A function of the steps before, and so part of a run's state.

    Args:
        num_microbatches: In a step, over all ranks.
    """

    def __init__(self, num_microbatches: int):
        self._bits = carry_bits(num_microbatches * _USES)
        self.tops: dict[str, int] = {}

    def spacing(self, name: str) -> float:
        """Of the grid of a tensor."""
        return spacing(self.tops.get(name, FIRST_TOP), self._bits)

    def limit(self, name: str) -> float:
        """The largest contribution that the grid of a tensor can take."""
        return limit(self.tops.get(name, FIRST_TOP))

    def overflowed(self, largest: Mapping[str, float]) -> list[str]:
        """The tensors of which a contribution was too large for its grid.

        Args:
            largest: The largest contribution to each tensor, over all ranks. What is not finite is no overflow: no grid
                would help.
        """
        return [name for name, value in largest.items() if self.limit(name) < value < torch.inf]

    def move_on(self, largest: Mapping[str, float]) -> None:
        """To the next step, or to the second attempt at one that overflowed.

        Args:
            largest: As `overflowed` takes it. Where it is not finite the grid stays: it says nothing of the next step.
        """
        for name, value in largest.items():
            top = next_top(self.tops.get(name), value) if math.isfinite(value) else None
            if top is not None:
                self.tops[name] = top


class ExactBucket(Bucket):
    """A run of gradients, summed in doubles on their grids.

    Args:
        bucket: Where the sums come out.
        totals: [elements] float64, to sum in.
        grids: Of the tensors.
        ledger: Where contributions are noted.
    """

    def __init__(self, bucket: Bucket, totals: Tensor, grids: Grids, ledger: Ledger):
        super().__init__(bucket.flat, bucket.slots)
        self.totals = totals
        self._grids = grids
        self._ledger = ledger
        sizes = [slot.view.numel() for slot in self.slots]
        self._parts = dict(zip((slot.name for slot in self.slots), totals.split(sizes), strict=True))

    def take(self, slot: Slot) -> None:
        gradient = slot.take_gradient()
        if gradient is not None:
            self.add(slot.name, gradient)

    def add(self, name: str, gradient: Tensor) -> None:
        """Rounds a contribution and adds it."""
        values = gradient.detach().contiguous().view(-1)
        self._ledger.add(name, self._parts[name], values, self._grids.spacing(name))

    def has(self, slot: Slot) -> bool:
        return self._ledger.has(slot.name)

    def clear_unused(self) -> None:
        for slot in self.slots:
            self.take(slot)
            if not self.has(slot):
                self._parts[slot.name].zero_()

    @property
    def local(self) -> Tensor:
        return self.totals

    def clear(self) -> None:
        super().clear()
        self._ledger.clear()

    def start(self, comm: Communicator) -> Work:
        return comm.start_all_reduce_into(self.flat, self.totals)


def build_exact_buckets(plan: Sequence[Members], allocate: Allocate, grids: Grids) -> tuple[list[ExactBucket], Ledger]:
    """(the buckets, and the doubles that belong to them; where all contributions to them are noted)."""
    buckets = [build_bucket(members, allocate) for members in plan]
    devices = [members[0][1].device for members in plan]
    totals = [
        allocate(bucket.flat.numel(), torch.float64, device) for bucket, device in zip(buckets, devices, strict=True)
    ]
    names = [slot.name for bucket in buckets for slot in bucket.slots]
    ledger = open_ledger(totals[0] if totals else torch.empty(0), names)
    return [ExactBucket(bucket, total, grids, ledger) for bucket, total in zip(buckets, totals, strict=True)], ledger


def separate_use(weight: Tensor, add: Callable[[Tensor], None]) -> Tensor:
    """The weight, for a use whose gradient is given to `add` instead of being added to that of the other uses.

    Rounded together, the gradients of two uses would give other bits than rounded one by one, as they are where the
    uses lie on different ranks.
    """
    used: Tensor = _SeparateUse.apply(weight, add)  # type: ignore[no-untyped-call]
    return used


class _SeparateUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, add: Callable[[Tensor], None]) -> Tensor:
        ctx.add = add
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.add(gradients[0])
        return None, None
