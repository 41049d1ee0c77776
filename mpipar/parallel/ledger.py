"""What a rank notes of the contributions to each tensor in a step: whether there were any, and how large they were.

On the CPU that is known with each contribution. On a GPU it is known on the GPU, and read once a step, for all tensors
together: whether a microbatch was at fault is a number there as its loss is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpipar.comm.device.rounding import add_rounded_on_gpu, is_on_gpu
from mpipar.comm.exact import add_rounded


class Ledger(Protocol):
    """The contributions of one rank in one step."""

    def has(self, name: str) -> bool:
        """Whether there was one to this tensor."""

    def add(self, name: str, total: Tensor, x: Tensor, spacing: float) -> None:
        """Rounds a contribution to a tensor, [n], adds it to its total, [n] float64, and notes it."""

    def largest(self) -> dict[str, float]:
        """By tensor; NaN where one was."""

    def take_fault(self, limits: Mapping[str, float]) -> Tensor:
        """Whether one since the last call was not finite, or larger than the limit of its tensor: [] bool, where the
        gradients are."""

    def clear(self) -> None:
        """A new step."""


def open_ledger(total: Tensor, names: Sequence[str]) -> Ledger:
    """For these tensors, of which one has this total: the others' lie on the same device."""
    return GpuLedger(names, total.device) if is_on_gpu(total) else CpuLedger()


class CpuLedger:
    """The contributions of a rank whose gradients are in the host's memory."""

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}
        self._recent: dict[str, float] = {}

    def has(self, name: str) -> bool:
        return name in self._largest

    def add(self, name: str, total: Tensor, x: Tensor, spacing: float) -> None:
        before = self._largest.get(name)
        largest = add_rounded(total, x, spacing, first=before is None)
        self._largest[name] = _larger(largest, before)
        self._recent[name] = _larger(largest, self._recent.get(name))

    def largest(self) -> dict[str, float]:
        return dict(self._largest)

    def take_fault(self, limits: Mapping[str, float]) -> Tensor:
        found = any(not value <= limits[name] for name, value in self._recent.items())
        self._recent.clear()
        return torch.tensor(found)

    def clear(self) -> None:
        self._largest.clear()
        self._recent.clear()


class GpuLedger:
    """The contributions of a rank whose gradients are on a GPU.

    Args:
        names: Of the tensors.
        device: Where they are.
    """

    def __init__(self, names: Sequence[str], device: torch.device):
        self._numbers = {name: number for number, name in enumerate(names)}
        self._added: set[str] = set()
        # Magnitudes, [2, len(names)]: of the step before the last call of `take_fault`, and since.
        self._magnitudes = torch.zeros(2, len(names), dtype=torch.float64, device=device)
        self._limits: tuple[list[float], Tensor] = [], torch.empty(0)  # as they were asked for last, and on the GPU

    def has(self, name: str) -> bool:
        return name in self._added

    def add(self, name: str, total: Tensor, x: Tensor, spacing: float) -> None:
        largest = self._magnitudes[1, self._numbers[name]]
        add_rounded_on_gpu(total, x, spacing, largest, first=name not in self._added)
        self._added.add(name)

    def largest(self) -> dict[str, float]:
        self._fold()
        values = self._magnitudes[0].tolist()
        return {name: values[self._numbers[name]] for name in self._added}

    def take_fault(self, limits: Mapping[str, float]) -> Tensor:
        found = (self._magnitudes[1] <= self._on_gpu([limits[name] for name in self._numbers])).all().logical_not()
        self._fold()
        return found

    def clear(self) -> None:
        self._added.clear()
        self._magnitudes.zero_()

    def _on_gpu(self, limits: list[float]) -> Tensor:
        """They change from step to step; nobody waits for the copy."""
        if limits != self._limits[0]:
            on_host = torch.tensor(limits, dtype=torch.float64, pin_memory=self._magnitudes.is_cuda)
            self._limits = limits, on_host.to(self._magnitudes.device, non_blocking=True)
        return self._limits[1]

    def _fold(self) -> None:
        """As integers magnitudes are in the same order, and NaN is the largest."""
        before, recent = self._magnitudes.view(torch.int64)
        torch.maximum(before, recent, out=before)
        recent.zero_()


def _larger(value: float, other: float | None) -> float:
    """NaN is larger than all."""
    return value if other is None or value > other or math.isnan(value) else other
