"""What the kernels compute, in numpy and torch: the reference that a GPU is compared with."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpipar.comm.device.runtime import Addition, Rounding


def at(address: int, size: int, dtype: str) -> Tensor:
    """[size] over memory of this process."""
    itemsize = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    words: Any = np.ctypeslib.as_array((ctypes.c_uint8 * (size * itemsize)).from_address(address))
    return torch.from_numpy(words).view(getattr(torch, dtype))


def add(addition: Addition) -> None:
    """Of the kernel of this name."""
    rows = [at(row + addition.source, addition.size, addition.dtype) for row in addition.rows]
    wide = torch.float32 if addition.dtype in ("float16", "bfloat16") else rows[0].dtype
    total = rows[0].to(wide, copy=True)
    for row in rows[1:]:
        total = torch.maximum(total, row.to(wide)) if addition.op == "max" else total + row.to(wide)
    if addition.op == "mean":
        total = total * torch.tensor(1 / len(rows), dtype=wide)
    targets = [addition.out] if addition.out is not None else [row + addition.target for row in addition.rows]
    for target in targets:
        at(target, addition.size, addition.into).copy_(total)


def round_and_add(rounding: Rounding) -> None:
    """Of the kernel of this name."""
    total, x = at(rounding.total, rounding.size, "float64"), at(rounding.x, rounding.size, rounding.dtype).double()
    rounded = (x + rounding.anchor) - rounding.anchor
    total.copy_(rounded if rounding.first else total + rounded)
    largest = at(rounding.largest, 1, "float64")
    if rounding.size:
        magnitudes = x.abs().view(torch.int64)  # ordered as the numbers are, NaN above all
        largest.view(torch.int64).copy_(torch.maximum(largest.view(torch.int64), magnitudes.max()))
