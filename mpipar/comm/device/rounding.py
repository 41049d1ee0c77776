"""Exact sums on a GPU: contributions are rounded and added, and their largest noted, without a word to the host.

The host learns the largest contributions when it asks for them, of all tensors at once.
"""

from __future__ import annotations

from torch import Tensor

from mpipar.comm.device import devices
from mpipar.comm.device.runtime import Rounding
from mpipar.comm.exact import anchor


def add_rounded_on_gpu(total: Tensor, x: Tensor, spacing: float, largest: Tensor, *, first: bool) -> None:
    """`exact.add_rounded` on the stream that is current: the same bits.

    Args:
        total: [n] float64, contiguous, on the grid.
        x: [n] of any floating-point dtype, contiguous.
        spacing: Of the grid.
        largest: [] float64, not negative or NaN. It becomes the larger one of itself and the largest |x|.
        first: Whether x is the first contribution, and total may hold anything.
    """
    gpu = devices.gpu_of(total)
    assert gpu is not None
    rounding = Rounding(
        total=total.data_ptr(),
        x=x.data_ptr(),
        size=x.numel(),
        dtype=str(x.dtype).removeprefix("torch."),
        anchor=anchor(spacing),
        first=first,
        largest=largest.data_ptr(),
    )
    gpu.runtime.round_and_add(rounding, gpu.runtime.current_stream("torch"))


def is_on_gpu(x: Tensor) -> bool:
    """Whether `add_rounded_on_gpu` is the one for it."""
    return devices.gpu_of(x) is not None
