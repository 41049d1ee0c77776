"""What microbatches come to, kept where it was computed, and read once.

On a GPU a number that Python looks at (`.item()`) makes the host wait for all that it has asked of the device so far,
and the device then wait for the host. So losses, token counts and faults stay there until the last microbatch of the
step has been asked for. Who reads them has waited for that before, with a deadline (`Communicator.catch_up`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpipar.train.metrics import Totals


class Readings:
    """Of one rank, in one step or evaluation."""

    def __init__(self) -> None:
        self._indices: list[int] = []
        self._values: list[Tensor] = []  # of each microbatch its loss, its count and its fault, on the device

    def add(self, index: int, loss: Tensor, count: Tensor, *, fault: Tensor | None = None) -> None:
        """Keeps what a microbatch came to.

        Args:
            index: In the step.
            loss: Over its tokens that count, a scalar.
            count: How many those are, a scalar.
            fault: Whether a gradient is not finite, or too large for its grid, a scalar; None if nobody has looked.
        """
        self._indices.append(index)
        loss = loss.detach().double()
        found = loss.new_zeros(()) if fault is None else fault.double()
        self._values.append(torch.stack((loss, count.double(), found)))

    def read_into(self, totals: Totals, rank: int) -> None:
        """Makes all that was kept part of what this rank adds up. It is copied to the host here, in one piece."""
        if not self._values:
            return
        read = torch.stack(self._values).tolist()
        for index, (loss, count, fault) in zip(self._indices, read, strict=True):
            totals.losses[index] = loss
            totals.owners[index] = rank
            totals.faults[index] = fault > 0 or not math.isfinite(loss)
            totals.num_tokens += int(count)
