"""The kernels for GPUs, compiled for the processor, against torch: all bits, for rows that begin anywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mpipar.comm import exact
from mpipar.comm.buffers import Op
from mpipar.comm.device import kernels
from mpipar.comm.device.runtime import Addition, Rounding
from tests.stand_in import arithmetic
from tests.stand_in.kernels import COMPILER, Compiled

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

_ROOM = 4096


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(tmp_path_factory.mktemp("kernels"))


def segment(seed: int) -> Tensor:
    """[4096] bytes that begin at a line of memory."""
    raw = torch.randint(0, 256, (_ROOM + 64,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return raw[-raw.data_ptr() % 64 :][:_ROOM]


def fill(row: Tensor, offset: int, size: int, dtype: torch.dtype, seed: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 50
    if dtype.is_floating_point and size > 3:
        values[:3] = torch.tensor([math.inf, 3e38, 1e-7])
    view = row[offset : offset + size * dtype.itemsize].view(torch.uint8).clone().view(dtype)
    view.copy_(values.abs() if dtype == torch.uint8 else values)
    row[offset : offset + size * dtype.itemsize] = view.view(torch.uint8)


def same(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """In all bits, but for those inside a NaN."""
    if not dtype.is_floating_point:
        return torch.equal(mine, theirs)
    mine, theirs = mine.clone().view(dtype), theirs.clone().view(dtype)
    return torch.equal(mine.nan_to_num(7, 8, 9), theirs.nan_to_num(7, 8, 9)) and torch.equal(
        mine.isnan(), theirs.isnan()
    )


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32", "uint8"])
def test_add(compiled: Compiled, dtype: str, op: Op) -> None:
    kind: torch.dtype = getattr(torch, dtype)
    if op == "mean" and not kind.is_floating_point:
        return
    itemsize = kind.itemsize
    for rows in (1, 2, 5):
        for size, first in [(1, 0), (3, 1), (37, 0), (100, 5), (64, 16 // itemsize), (200, 3)]:
            offset = first * itemsize
            for out_at in (None, 0, 8, 16):
                results = []
                for add in (compiled.add, arithmetic.add):
                    segments = [segment(seed) for seed in range(rows)]
                    out = segment(99)
                    for seed, row in enumerate(segments):
                        fill(row, offset, size, kind, 10 * seed + size)
                    add(
                        Addition(
                            rows=tuple(row.data_ptr() for row in segments),
                            table=0,
                            source=offset,
                            target=offset,
                            out=None if out_at is None else out.data_ptr() + out_at,
                            size=size,
                            dtype=dtype,
                            into=dtype,
                            op=op,
                        )
                    )
                    at = offset if out_at is None else out_at
                    told = segments if out_at is None else [out]
                    results.append(
                        [(row[:at], row[at : at + size * itemsize], row[at + size * itemsize :]) for row in told]
                    )
                for mine, theirs in zip(*results, strict=True):
                    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[2], theirs[2]), "bytes around it"
                    assert same(mine[1], theirs[1], kind)


@pytest.mark.parametrize("into", ["float32", "bfloat16", "float16"])
def test_add_doubles_into(compiled: Compiled, into: str) -> None:
    kind: torch.dtype = getattr(torch, into)
    results = []
    for add in (compiled.add, arithmetic.add):
        segments = [segment(seed) for seed in range(3)]
        for seed, row in enumerate(segments):
            fill(row, 8, 99, torch.float64, seed)
        rows = tuple(row.data_ptr() for row in segments)
        add(Addition(rows, 0, source=8, target=2048, out=None, size=99, dtype="float64", into=into, op="sum"))
        results.append([row[2048 : 2048 + 99 * kind.itemsize] for row in segments])
    for mine, theirs in zip(*results, strict=True):
        assert same(mine, theirs, kind)


def test_every_16_bit_float(compiled: Compiled) -> None:
    """Widened and narrowed again it is the same."""
    for dtype in ("float16", "bfloat16"):
        kind: torch.dtype = getattr(torch, dtype)
        values = torch.arange(65536).to(torch.int32).to(torch.int16)
        out = torch.zeros(65536, dtype=torch.int16)
        rows = (values.data_ptr(),)
        compiled.add(Addition(rows, 0, 0, 0, out=out.data_ptr(), size=65536, dtype=dtype, into=dtype, op="sum"))
        assert same(out.view(torch.uint8), values.view(torch.uint8), kind)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("first", [True, False])
def test_round_and_add(compiled: Compiled, dtype: str, first: bool) -> None:
    kind: torch.dtype = getattr(torch, dtype)
    anchor = exact.anchor(exact.spacing(2, 5))
    for special in (1.0, math.inf, math.nan, -math.nan):
        x = torch.randn(501, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(kind)
        x[77] = special
        found = []
        for run in (compiled.round_and_add, arithmetic.round_and_add):
            total = torch.full((501,), math.nan) if first else torch.arange(501.0)
            total, largest = total.double(), torch.zeros(1, dtype=torch.float64)
            run(Rounding(total.data_ptr(), x.data_ptr(), 501, dtype, anchor, first, largest.data_ptr()))
            found.append((total.view(torch.int64), largest))
        assert same(found[0][0].view(torch.uint8), found[1][0].view(torch.uint8), torch.float64)
        assert str(found[0][1]) == str(found[1][1])
        # and what the CPU's own rounding makes of it
        wanted = torch.empty(501, dtype=torch.float64) if first else torch.arange(501.0).double()
        magnitude = exact.add_rounded(wanted, x, exact.spacing(2, 5), first=first)
        assert same(found[0][0].view(torch.uint8), wanted.view(torch.uint8), torch.float64)
        assert str(found[0][1].item()) == str(magnitude)


def test_vectors_begin_where_rows_do() -> None:
    base = Addition((1024, 4096), 0, 4, 4, None, 100, "float32", "float32", "sum")
    assert kernels.elements_one_by_one(base, 4) == 3
    moved = Addition((1024, 4100), 0, 4, 4, None, 100, "float32", "float32", "sum")
    assert kernels.elements_one_by_one(moved, 4) == 100  # no boundary in common
