"""Numbers to check with. They are small integers, so that all their sums are exact in every dtype here.

Sums are exact in bfloat16, which counts to 256, up to 64 ranks, and in float16 up to 512.
"""

from __future__ import annotations

import torch
from torch import Tensor


def summand(rank: int, elements: int, dtype: torch.dtype) -> Tensor:
    """[elements], what a rank gives to a sum. It differs between ranks and between neighbouring elements."""
    return (_base(elements) + rank % 4).to(dtype)


def total(num_ranks: int, elements: int, dtype: torch.dtype) -> Tensor:
    """[elements], the sum of all ranks' summands."""
    return (_base(elements) * num_ranks + sum(rank % 4 for rank in range(num_ranks))).to(dtype)


def numbers(elements: int, dtype: torch.dtype, *, start: int = 0) -> Tensor:
    """[elements] that are moved: a place's number, from `start`, in a cycle that no power of two divides."""
    return (torch.arange(start, start + elements) % 251).to(dtype)


def _base(elements: int) -> Tensor:
    return torch.arange(elements) % 17 % 3
