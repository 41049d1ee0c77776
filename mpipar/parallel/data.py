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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mpipar.comm import Communicator, Work
from mpipar.comm.arena import Arena, arena_bytes
from mpipar.parallel.buckets import Allocate, Members, Slot, build_bucket, num_bytes, plan_buckets, zeros

Scalars = npt.NDArray[np.float64]


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

    Attributes:
        buckets: The gradients.
        unshared: Why the buckets are private memory; None if they are shared.
    """

    def __init__(self, model: nn.Module, comm: Communicator, *, bucket_bytes: int = 16 << 20, share: bool = True):
        self.model = model
        self.comm = comm
        plan = plan_buckets(model, bucket_bytes)
        self._arena: Arena | None = None
        allocate, self.unshared = self._memory(plan) if share else (zeros, "as asked")
        self.buckets = [build_bucket(members, allocate) for members in plan]
        self._slots = [slot for bucket in self.buckets for slot in bucket.slots]
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
        exists = np.array([slot.parameter.grad is not None for slot in self._slots], np.float64)
        self._start(up_to=len(self.buckets))
        totals = self.comm.all_reduce(np.concatenate([scalars, exists]))
        for work in self._works:
            work.wait()
        for slot, count in zip(self._slots, totals[len(scalars) :], strict=True):
            slot.settle(exists=count > 0)
        self._works.clear()
        self._missing = self._all_missing()
        return totals[: len(scalars)]

    def gradient_norm(self) -> float:
        """Collective, after `reduce`: the L2 norm over all gradients, the same bits on every rank.

        Each rank takes the norm of its chunk of every bucket: 1/n of the work, and no rank can come to another
        result because its processor, or its number of threads, adds in another order.
        """
        chunks = [bucket.flat[self.comm.chunk(bucket.flat.numel())] for bucket in self.buckets]
        norms = [torch.linalg.vector_norm(chunk).item() for chunk in chunks]
        squares = self.comm.all_reduce(np.array([sum(norm * norm for norm in norms)]))
        return math.sqrt(squares[0])

    def scale_gradients(self, factor: float) -> None:
        """Multiplies all gradients, after `reduce`."""
        for bucket in self.buckets:
            bucket.flat.mul_(factor)

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
            slot.adopt()
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
            self._works.append(self.comm.start_all_reduce(bucket.flat))

    def _memory(self, plan: list[Members]) -> tuple[Allocate, str | None]:
        """Collective: what gives the memory of the buckets, and why it is not shared."""
        if any(parameter.device.type != "cpu" for members in plan for _, parameter in members):
            return zeros, "gradients are on a device"
        arena = self.comm.open_arena(arena_bytes([num_bytes(members) for members in plan]))
        if isinstance(arena, str):
            return zeros, arena
        self._arena = arena
        return arena.allocate, None

    def _all_missing(self) -> list[set[str]]:
        """For each bucket the gradients that are not final yet: at the beginning of a step, all."""
        return [{slot.name for slot in bucket.slots} for bucket in self.buckets]

    def _broadcast_state(self) -> None:
        """Parameters and buffers become those of rank 0; frozen ones too."""
        self.comm.broadcast_state({**dict(self.model.named_parameters()), **dict(self.model.named_buffers())})
