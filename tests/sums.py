"""Arrays whose reduction is known, for tests of collectives on torch tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from mpipar.comm import Communicator
from mpipar.comm.buffers import Op


def draw(size: int, rank: int, dtype: torch.dtype) -> Tensor:
    """What a rank brings: small whole numbers, whose sums every dtype holds exactly."""
    return torch.randint(0, 6, (size,), generator=torch.Generator().manual_seed(1000 * rank + size)).to(dtype)


def expected(comm: Communicator, size: int, dtype: torch.dtype, op: Op) -> Tensor:
    """What comes of it, float64 [size]."""
    given = torch.stack([draw(size, rank, dtype).double() for rank in range(comm.size)])
    return {"sum": given.sum(0), "mean": given.mean(0), "max": given.amax(0)}[op]


def check(found: Tensor, wanted: Tensor, op: Op = "sum") -> None:
    """Exactly, but for the division of a mean."""
    tolerance = torch.finfo(found.dtype).eps if op == "mean" else 0.0
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=tolerance, atol=0)
