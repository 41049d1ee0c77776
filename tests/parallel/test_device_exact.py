"""Sums without rounding on a GPU: the bits of the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from mpipar.comm import exact
from mpipar.parallel.ledger import CpuLedger, GpuLedger
from tests.stand_in.runtime import StandIn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_contributions_have_the_bits_of_the_cpu(device: StandIn, dtype: torch.dtype) -> None:
    size, step = 1000, exact.spacing(3, 4)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(size, generator=generator).to(dtype) for _ in range(5)]
    given[3][7] = math.inf
    total, x = device.array(size, torch.float64), device.array(size, dtype)
    on_gpu, on_cpu = GpuLedger(["a", "b"], torch.device("cpu")), CpuLedger()
    device.magnitudes(on_gpu)
    wanted = torch.full((size,), math.nan, dtype=torch.float64)
    for i, values in enumerate(given):
        device.put(x, values)
        on_gpu.add("b", total, x, step)
        on_cpu.add("b", wanted, values, step)
        device.finish()
        limits = {"a": 1.0, "b": exact.limit(3)}
        assert on_gpu.take_fault(limits) == on_cpu.take_fault(limits) == (i == 3)
        assert on_gpu.largest() == on_cpu.largest()
        assert torch.equal(device.get(total).view(torch.int64), wanted.view(torch.int64))
    assert on_gpu.has("b") and not on_gpu.has("a")


def test_a_nan_is_the_largest(device: StandIn) -> None:
    total, x = device.array(3, torch.float64), device.array(3, torch.float32)
    ledger = GpuLedger(["a"], torch.device("cpu"))
    device.magnitudes(ledger)
    for values in ([1.0, -math.nan, 2.0], [math.inf, 0.0, 0.0]):
        device.put(x, torch.tensor(values))
        ledger.add("a", total, x, 2.0**-20)
    device.finish()
    assert math.isnan(ledger.largest()["a"]) and not ledger.take_fault({"a": 1e30})
    ledger.clear()
    assert ledger.largest() == {}
