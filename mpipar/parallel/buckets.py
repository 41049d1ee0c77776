"""Gradients in flat memory: they are accumulated where they are reduced.

Parameters are laid out one after the other in a few large buckets, in the order in which backward is expected to
finish with them: the reverse of their order in the model. While a bucket is reduced, backward works on the next.

`parameter.grad` is a view into its bucket. Autograd adds to a gradient that is there in place, and where there is none
(`zero_grad(set_to_none=True)`) it brings a tensor of its own, which `take` copies in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpipar.comm import Communicator, Work
from mpipar.errors import MessageError

Allocate = Callable[[int, torch.dtype, torch.device], Tensor]
"""(elements, dtype, device) -> the flat memory of a bucket. A shared-memory arena is another one of these."""


@dataclass(slots=True)
class Slot:
    """The place of one parameter's gradient."""

    name: str
    parameter: nn.Parameter
    view: Tensor  # of the parameter's shape, into the bucket

    def take_gradient(self) -> Tensor | None:
        """What autograd has made for the parameter, which then has none any more."""
        gradient = self.parameter.grad
        if gradient is not None and gradient.layout != torch.strided:
            raise MessageError(f"the gradient of {self.name} is {gradient.layout}: sparse gradients cannot be reduced")
        self.parameter.grad = None
        return gradient

    def settle(self, exists: bool) -> None:
        """After the reduction: the gradient is the bucket's content, or none where no rank had one."""
        self.parameter.grad = self.view if exists else None


class Bucket:
    """A run of gradients that is reduced as one array.

    Args:
        flat: [elements], its memory.
        slots: The gradients in it, in their order.
    """

    def __init__(self, flat: Tensor, slots: list[Slot]):
        self.flat = flat
        self.slots = slots

    def take(self, slot: Slot) -> None:
        """Moves a gradient that autograd has made into the bucket."""
        if slot.parameter.grad is not slot.view:
            gradient = slot.take_gradient()
            if gradient is not None:
                slot.view.copy_(gradient)
                slot.parameter.grad = slot.view

    def has(self, slot: Slot) -> bool:
        """Whether there is a gradient for the parameter on this rank."""
        return slot.parameter.grad is not None

    def clear_unused(self) -> None:
        """Zeroes what a step before has left in the slots of parameters that got no gradient in this one."""
        for slot in self.slots:
            self.take(slot)
            if not self.has(slot):
                slot.view.zero_()

    @property
    def local(self) -> Tensor:
        """What this rank adds up in, [elements]."""
        return self.flat

    def clear(self) -> None:
        """There are no gradients."""
        for slot in self.slots:
            slot.parameter.grad = None

    def start(self, comm: Communicator) -> Work:
        """Starts the reduction, of the sum over the ranks of `comm`."""
        return comm.start_all_reduce(self.flat)


Members = list[tuple[str, nn.Parameter]]
"""The parameters of one bucket, by name."""


def plan_buckets(model: nn.Module, bucket_bytes: int) -> list[Members]:
    """Divides the trainable parameters into buckets. A tied parameter is in one, a frozen one in none.

    Args:
        model: Its parameters must have their final dtype and device.
        bucket_bytes: A bucket is closed when it has reached this size; dtypes and devices never share one.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[Members] = []
    open_groups: dict[tuple[torch.dtype, torch.device], Members] = {}
    for name, parameter in reversed(trainable):
        kind = (parameter.dtype, parameter.device)
        if kind not in open_groups:
            open_groups[kind] = []
            groups.append(open_groups[kind])
        open_groups[kind].append((name, parameter))
        if num_bytes(open_groups[kind]) >= bucket_bytes:
            del open_groups[kind]
    return groups


def num_bytes(members: Members) -> int:
    """The size of a bucket."""
    return sum(parameter.numel() * parameter.element_size() for _, parameter in members)


def num_elements(members: Members) -> int:
    """The number of gradients in a bucket."""
    return sum(parameter.numel() for _, parameter in members)


def build_bucket(members: Members, allocate: Allocate) -> Bucket:
    """Lays out the gradients of a bucket's parameters in memory that `allocate` gives."""
    first = members[0][1]
    flat = allocate(num_elements(members), first.dtype, first.device)
    slots = []
    offset = 0
    for name, parameter in members:
        view = flat[offset : offset + parameter.numel()].view(parameter.shape)
        slots.append(Slot(name, parameter, view))
        offset += parameter.numel()
    return Bucket(flat, slots)


def zeros(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Private memory of this process."""
    return torch.zeros(elements, dtype=dtype, device=device)
