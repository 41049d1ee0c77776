"""Ways to hold a sum of gradients: as floats that round, and as what does not.

    float32          what ordinary training adds; the order of additions shows in the bits
    float64          comm/exact: doubles on a grid, by which no addition rounds
    int64, int32     fixed point: integers, as multiples of the same grid's spacing

A grid belongs to a tensor, or to a block of one: where the values of a tensor are of very different size, blocks keep
more of the small ones. 32 bits have few to spare for surprises, so their grids are given less room.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mpipar import compiled
from mpipar.comm import exact
from mpipar.comm.exact import ROOM

BLOCK = 4096
"""Elements that share an exponent, where a tensor does not have one for all."""

_RUN = 1 << 16  # elements: what lies between two passes is still in a core's cache; whole blocks


@dataclass(frozen=True, kw_only=True)
class Representation:
    """Of a sum.

    Args:
        title: For people.
        dtype: Of the sum.
        mantissa: Bits that a sum has besides its sign.
        room: How many times, as a power of two, a contribution may be larger than the largest one expected.
        blocks: Whether there is a grid for each block; otherwise for each tensor.
        rounds: Whether additions round, so that there is no grid.
        extra_bytes: An element, beside the sum: the float32 that comes out, where it cannot take the sum's place.
        processor: For which fixed.c is compiled, as the compiler names it.
    """

    title: str
    dtype: torch.dtype
    mantissa: int
    room: int = ROOM
    blocks: bool = False
    rounds: bool = False
    extra_bytes: int = 0
    processor: str = "native"

    def spacing(self, top: int, bits: int) -> float:
        """Of the grid for contributions that are expected below 2^top, 2^bits of them at most."""
        return 2.0 ** (top + self.room + bits - self.mantissa)

    def kept(self, bits: int) -> int:
        """Bits that are kept of the largest contribution expected."""
        return self.mantissa - self.room - bits if not self.rounds else self.mantissa


def representations(*, narrow_room: int = 2, processor: str = "native") -> dict[str, Representation]:
    """All, by name.

    Args:
        narrow_room: The `room` of 32-bit grids.
        processor: For which fixed point is compiled.
    """
    float64 = Representation(title="float64, pre-rounded", dtype=torch.float64, mantissa=53, extra_bytes=4)
    int64 = replace(float64, title="int64, a grid a tensor", dtype=torch.int64, mantissa=63, processor=processor)
    int32 = replace(int64, title="int32, a grid a tensor", dtype=torch.int32, mantissa=31, extra_bytes=0)
    int32 = replace(int32, room=narrow_room)
    return {
        "float32": Representation(title="float32, ordinary", dtype=torch.float32, mantissa=24, rounds=True),
        "float64": float64,
        "int64": int64,
        "int32": int32,
        "blocks": replace(int32, title=f"int32, a grid a {BLOCK:,}", blocks=True),
    }


class Sum:
    """Of named gradients.

    Args:
        how: The representation.
        sizes: Elements of each tensor.
        tops: For each tensor the tops of its grids: one, or one for each block.
        bits: For the sum of 2^bits contributions.
        compiled: Whether to use what is compiled; torch's own operations if not.
    """

    def __init__(
        self,
        how: Representation,
        sizes: Mapping[str, int],
        tops: Mapping[str, Sequence[int]],
        bits: int,
        *,
        compiled: bool,
    ):
        self.how = how
        self.totals = torch.zeros(sum(sizes.values()), dtype=how.dtype)
        self._parts = dict(zip(sizes, self.totals.split(list(sizes.values())), strict=True))
        self._spacings = {
            name: torch.tensor([how.spacing(top, bits) for top in tops[name]], dtype=torch.float64) for name in sizes
        }
        self._scales = {name: 1 / spacings for name, spacings in self._spacings.items()}
        self._compiled = compiled

    def add(self, name: str, x: Tensor) -> None:
        """Rounds a contribution onto its grids, and adds it.

        Args:
            name: Of the tensor.
            x: [n] float32.
        """
        total, block = self._parts[name], BLOCK if self.how.blocks else x.numel()
        if self.how.rounds:
            total.add_(x)
        elif self.how.dtype == torch.float64:
            self._add_doubles(total, x, self._spacings[name].item())
        elif self._compiled:
            _add_compiled(total, x, self._scales[name], block, self.how.processor)
        else:
            _add_plain(total, x, self._scales[name], block)

    def values(self) -> Tensor:
        """[elements] float64, what the sum stands for."""
        if self.how.rounds or self.how.dtype == torch.float64:
            return self.totals.double()
        pieces = []
        for name, total in self._parts.items():
            block = BLOCK if self.how.blocks else total.numel()
            pieces.append(total.double() * self._spacings[name].repeat_interleave(block)[: total.numel()])
        return torch.cat(pieces)

    def _add_doubles(self, total: Tensor, x: Tensor, spacing: float) -> None:
        if self._compiled:
            exact.add_rounded(total, x, spacing, first=False)
        else:
            with mock.patch.object(exact, "_functions", lambda: None):
                exact.add_rounded(total, x, spacing, first=False)


def has_compiled(how: Representation) -> bool:
    """Whether there is more than torch's operations to do it with."""
    if how.rounds:
        return False
    return compiled.is_built() if how.dtype == torch.float64 else _library(how.processor) is not None


def _add_plain(total: Tensor, x: Tensor, scales: Tensor, block: int) -> list[float]:
    """Fixed point in operations of torch. Returns the largest |x| of each block, or of each run of one."""
    working = torch.float32 if total.dtype == torch.int32 else torch.float64
    largest: list[float] = []
    for into, run, scale in _runs(total, x, scales, block):
        into.add_((run.to(working) * scale.to(working)).round_().to(total.dtype))
        largest += run.abs().amax(-1).tolist()
    return largest


def _runs(total: Tensor, x: Tensor, scales: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(total, x, scale) in pieces that fit the cache, each [blocks, elements] with a column of scales."""
    if scales.numel() == 1:
        for into, run in zip(total.split(_RUN), x.split(_RUN), strict=True):
            yield into.view(1, -1), run.view(1, -1), scales
        return
    whole = x.numel() // block * block
    parts = (total[:whole].split(_RUN), x[:whole].split(_RUN), scales[: whole // block].split(_RUN // block))
    for into, run, scale in zip(*parts, strict=True):
        yield into.view(-1, block), run.view(-1, block), scale.view(-1, 1)
    if whole < x.numel():
        yield total[whole:].view(1, -1), x[whole:].view(1, -1), scales[-1:]


def _add_compiled(total: Tensor, x: Tensor, scales: Tensor, block: int, processor: str) -> Tensor:
    """Fixed point in one pass. Returns the largest |x| of each block."""
    library = _library(processor)
    assert library is not None and x.dtype == torch.float32
    largest = torch.empty(scales.numel(), dtype=torch.float32)
    add = library.add_int32 if total.dtype == torch.int32 else library.add_int64
    add(total.data_ptr(), x.data_ptr(), x.numel(), scales.data_ptr(), largest.data_ptr(), block)
    return largest


@lru_cache
def _library(processor: str) -> Any | None:
    """fixed.c, compiled now; None where there is no compiler, or not for that processor."""
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or shutil.which("cc")
    if compiler is None:
        return None
    options = ["-O3", f"-march={processor}", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "fixed.so"
        source = Path(__file__).with_name("fixed.c")
        done = subprocess.run(
            [compiler, *options, str(source), "-o", str(built), "-lm"], capture_output=True, check=False
        )
        if done.returncode != 0:
            return None
        library = ctypes.CDLL(str(built))
    for function in (library.add_int32, library.add_int64):
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t] * 2
    return library
