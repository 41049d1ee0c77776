"""Data parallelism: every rank has the whole model and computes some of the step's microbatches.

    forward     nothing
    backward    gradients add up in the rank's buckets; in the last backward of a step each bucket's all-reduce starts
                when its gradients are there, while backward goes on with the layers below
    reduce      waits for the buckets, and adds up the step's scalars
    bytes       once a step, however many microbatches: on one host each rank adds up its part of the gradients in the
                memory that they share; between hosts it sends its slice round a ring

Gradients and scalars are summed, not averaged: the caller divides once, by the step's global token count, so that ranks
may compute different numbers of microbatches.

Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020, explains buckets,
hooks and overlap. Here the order of buckets is fixed by the model, so ranks negotiate nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mpipar.comm import Communicator, Work
from mpipar.comm.arena import Arena, arena_bytes
from mpipar.comm.device.arena import DeviceArena
from mpipar.errors import MessageError
from mpipar.parallel.buckets import (
    Allocate,
    Bucket,
    Members,
    Slot,
    build_bucket,
    num_bytes,
    num_elements,
    plan_buckets,
    zeros,
)
from mpipar.parallel.exact import ExactBucket, Grids, build_exact_buckets, separate_use
from mpipar.parallel.ledger import Ledger

Scalars = npt.NDArray[np.float64]

_NORM_BLOCK = 1 << 18  # elements


class DataParallel:
    """Keeps the replicas of a model together. Collective to build: the weights become those of rank 0.

        replicas = DataParallel(model, comm=mesh["dp"])
        for tokens in microbatches[:-1]:
            model.loss(tokens).backward()
        with replicas.final_backward():
            model.loss(microbatches[-1]).backward()
        totals = replicas.reduce(np.array([loss_sum, num_tokens]))
        replicas.scale_gradients(1 / totals[1])
        optimizer.step()
        optimizer.zero_grad()

    The model is used as it is, under its own names. A parameter that got a gradient on no rank has none after
    `reduce`, one that got it on some ranks has their sum on all: as if one process had computed every microbatch.

    Args:
        model: In its final dtype, on its final device, with `requires_grad` as it is to stay.
        comm: The dp axis.
        bucket_bytes: Size at which a bucket is closed. Small ones start earlier, large ones are reduced faster.
        share: Lay the buckets in memory that the ranks of the host share, if a host has more than one. A reduction is
            then done in place.
        grids: To sum without rounding, on these grids; None to add as floats are added, in some order.

    Attributes:
        buckets: The gradients.
        largest: Of the step that was reduced last, with `grids`: the largest contribution to each tensor on any rank.
        unshared: Why the buckets are private memory; None if they are shared.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        *,
        bucket_bytes: int = 16 << 20,
        share: bool = True,
        grids: Grids | None = None,
    ):
        self.model = model
        self.comm = comm
        self.grids = grids
        self.largest: dict[str, float] = {}
        plan = plan_buckets(model, bucket_bytes)
        self._device = _device_of(plan)
        self._arena: Arena | DeviceArena | None = None
        self._neighbours: tuple[int, ...] = ()  # whose its segments are
        allocate, self.unshared = self._memory(plan) if share else (zeros, "as asked")
        self.buckets: Sequence[Bucket]
        self._ledger: Ledger | None = None
        if grids is None:
            self.buckets = [build_bucket(members, allocate) for members in plan]
        else:
            self.buckets, self._ledger = build_exact_buckets(plan, allocate, grids)
        self._slots = [slot for bucket in self.buckets for slot in bucket.slots]
        self._norm_blocks = [block for slot in self._slots for block in slot.view.view(-1).split(_NORM_BLOCK)]
        self._streams: set[torch.cuda.Stream] = set()  # on which they were started, if on a GPU
        self._works: list[Work] = []  # of the buckets that are under way, in bucket order
        self._missing = self._all_missing()
        self._final = False
        self._hooks = [
            slot.parameter.register_post_accumulate_grad_hook(self._hook(index, slot))
            for index, bucket in enumerate(self.buckets)
            for slot in bucket.slots
        ]
        self._broadcast_state()

    @contextmanager
    def final_backward(self) -> Iterator[None]:
        """Around the last backward of a step: a gradient that it brings is final, and its reduction may start."""
        self._final = True
        try:
            yield
        finally:
            self._final = False

    def reduce(self, scalars: Scalars) -> Scalars:
        """Collective: waits until every gradient is the sum over all ranks, and returns the sum of the scalars.

        Args:
            scalars: [k] float64, this rank's share of what the step adds up: loss, tokens, flags.

        Raises:
            StallError: A rank did not take part in time.
        """
        for bucket in self.buckets[len(self._works) :]:
            bucket.clear_unused()
        # Which gradients exist is itself a sum over ranks, and rides with the scalars.
        exists = np.array([bucket.has(slot) for bucket in self.buckets for slot in bucket.slots], np.float64)
        self._start(up_to=len(self.buckets))
        totals = self.comm.all_reduce(np.concatenate([scalars, exists]))
        if self._ledger is not None:
            self.largest = self._largest_anywhere(self._ledger)
        for work in self._works:
            work.wait()
        self._follow_hooks()
        for slot, count in zip(self._slots, totals[len(scalars) :], strict=True):
            slot.settle(exists=count > 0)
        self._works.clear()
        self._missing = self._all_missing()
        return totals[: len(scalars)]

    def gradient_norm(self) -> float:
        """Collective, after `reduce`: the L2 norm over all gradients, the same bits on every rank.

        Each rank takes the norms of some blocks: 1/n of the work. Blocks are runs of one tensor, and their squares are
        added without rounding, so the number of ranks does not enter either.
        """
        mine = self.comm.chunk(len(self._norm_blocks))
        squares = np.zeros(len(self._norm_blocks))
        norms = [torch.linalg.vector_norm(block).double() for block in self._norm_blocks[mine]]
        if norms:
            self.comm.catch_up(self._device)
            squares[mine] = [norm**2 for norm in torch.stack(norms).tolist()]  # read from a GPU once
        return math.sqrt(math.fsum(self.comm.all_reduce(squares)))

    def separate_use(self, name: str) -> Callable[[Tensor], Tensor]:
        """What to pass the weight `name` through for a use beside its first one, with `grids`: see `exact`."""
        exact = [bucket for bucket in self.buckets if isinstance(bucket, ExactBucket)]
        place = next(bucket for bucket in exact for slot in bucket.slots if slot.name == name)
        return lambda weight: separate_use(weight, lambda gradient: place.add(name, gradient))

    def take_fault(self) -> Tensor | None:
        """With `grids`: whether since the last call a contribution of this rank was not finite, or too large.

        Returns [] bool, where the gradients are: on a GPU nobody has waited for it. None without grids.
        """
        if self._ledger is None or self.grids is None:
            return None
        return self._ledger.take_fault({slot.name: self.grids.limit(slot.name) for slot in self._slots})

    def local_gradients(self) -> list[tuple[str, Tensor]]:
        """This rank's gradients so far, before `reduce`: for each bucket what it adds up in."""
        for bucket in self.buckets:
            bucket.clear_unused()
        return [(f"bucket {i}", bucket.local) for i, bucket in enumerate(self.buckets)]

    def scale_gradients(self, factor: float) -> None:
        """Multiplies all gradients, after `reduce`."""
        for bucket in self.buckets:
            bucket.flat.mul_(factor)

    def move_to(self, comm: Communicator) -> None:
        """Collective: goes on with those who are left of the ranks, from the beginning of the step.

        Args:
            comm: The dp axis without the dead.
        """
        if self._arena is not None:
            self._arena = comm.adopt_arena(self._arena, self._neighbours)
            self._neighbours = comm.neighbours
        self.comm = comm
        self.start_over()

    def start_over(self) -> None:
        """Forgets the step: its gradients, and what was under way."""
        self._works.clear()
        self._missing = self._all_missing()
        for bucket in self.buckets:
            bucket.clear()

    def close(self) -> None:
        """Collective: takes the hooks off the model. Gradients stay views of the buckets."""
        for hook in self._hooks:
            hook.remove()
        if self._arena is not None:
            self.comm.close_arena(self._arena)
            self._arena = None

    def _hook(self, index: int, slot: Slot) -> Callable[[Tensor], None]:
        def on_gradient(_: Tensor) -> None:
            if index < len(self._works):
                raise RuntimeError(
                    f"the gradient of {slot.name} changed while it was being reduced: run one backward inside "
                    "final_backward(), the last of the step, and call reduce() before the next"
                )
            self.comm.progress.look_for_deaths()  # in the middle of backward, not only behind it
            self.buckets[index].take(slot)
            if not self._final:
                return
            self._missing[index].discard(slot.name)
            self._start_ready()

        return on_gradient

    def _start_ready(self) -> None:
        """Starts the buckets whose turn has come, and moves those that are under way."""
        ready = len(self._works)
        while ready < len(self.buckets) and not self._missing[ready]:
            ready += 1
        if ready > len(self._works):
            self._start(up_to=ready)
        else:
            self.comm.progress.poll()

    def _start(self, up_to: int) -> None:
        for bucket in self.buckets[len(self._works) : up_to]:
            if bucket.flat.is_cuda:
                self._streams.add(torch.cuda.current_stream(bucket.flat.device))
            self._works.append(bucket.start(self.comm))

    def _follow_hooks(self) -> None:
        """On a GPU a sum is there for the stream on which its hook ran; from now on for this thread's as well."""
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        self._streams.clear()

    def _memory(self, plan: list[Members]) -> tuple[Allocate, str | None]:
        """Collective: what gives the memory of the buckets, and why it is not shared."""
        if self._device.type not in ("cpu", "cuda"):
            return zeros, f"gradients are on a device of type {self._device.type}"
        sizes = [num_bytes(members) for members in plan]
        if self.grids is not None:
            sizes += [8 * num_elements(members) for members in plan]
        arena = self.comm.open_arena(arena_bytes(sizes), self._device)
        if isinstance(arena, str):
            return zeros, arena
        self._arena = arena
        self._neighbours = self.comm.neighbours
        return arena.allocate, None

    def _largest_anywhere(self, ledger: Ledger) -> dict[str, float]:
        """Collective: the largest contribution of any rank to each tensor; the next step begins with none."""
        self.comm.catch_up(self._device)
        mine = ledger.largest()
        largest = self.comm.all_reduce(np.array([mine.get(slot.name, 0.0) for slot in self._slots]), "max")
        ledger.clear()
        return dict(zip((slot.name for slot in self._slots), largest.tolist(), strict=True))

    def _all_missing(self) -> list[set[str]]:
        """For each bucket the gradients that are not final yet: at the beginning of a step, all."""
        return [{slot.name for slot in bucket.slots} for bucket in self.buckets]

    def _broadcast_state(self) -> None:
        """Parameters and buffers become those of rank 0; frozen ones too."""
        self.comm.broadcast_state({**dict(self.model.named_parameters()), **dict(self.model.named_buffers())})


def _device_of(plan: Sequence[Members]) -> torch.device:
    """Where all parameters are."""
    devices = {parameter.device for members in plan for _, parameter in members} or {torch.device("cpu")}
    if len(devices) > 1:
        where = " and ".join(sorted(str(device) for device in devices))
        raise MessageError(f"parameters are on {where}: move the model to one device of a rank")
    return devices.pop()
