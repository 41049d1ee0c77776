"""What microbatches come to, kept where it was computed, and read once.

On a GPU a number that Python looks at (`.item()`) makes the host wait for all that it has asked of the device so far,
and the device then wait for the host. So losses and token counts stay there until the last microbatch of the step has
been asked for.
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
        self._faults: list[bool] = []
        self._values: list[Tensor] = []  # of each microbatch its loss and its count, on the device

    def add(self, index: int, loss: Tensor, count: Tensor, *, fault: bool = False) -> None:
        """Keeps what a microbatch came to.

        Args:
            index: In the step.
            loss: Over its tokens that count, a scalar.
            count: How many those are, a scalar.
            fault: Whether a gradient is known to be not finite, or too large for its grid.
        """
        self._indices.append(index)
        self._faults.append(fault)
        self._values.append(torch.stack((loss.detach().double(), count.double())))

    def read_into(self, totals: Totals, rank: int) -> None:
        """Makes all that was kept part of what this rank adds up. The one moment at which the host waits."""
        if not self._values:
            return
        read = torch.stack(self._values).tolist()
        for index, fault, (loss, count) in zip(self._indices, self._faults, read, strict=True):
            totals.losses[index] = loss
            totals.owners[index] = rank
            totals.faults[index] = fault or not math.isfinite(loss)
            totals.num_tokens += int(count)
