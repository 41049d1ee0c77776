"""What is known of GPUs."""

from __future__ import annotations

import pytest

from mpipar.train.config import PrecisionName
from mpipar.train.device import Gpu
from mpipar.train.peak import peak_flops, peak_of_all


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "tf32", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA Z9", "bf16", None),
    ],
)
def test_by_name(name: str, precision: PrecisionName, tflops: float | None) -> None:
    assert peak_flops(name, precision) == (None if tflops is None else tflops * 1e12)


def test_of_several() -> None:
    known, unknown = Gpu("0", "NVIDIA H200", (9, 0)), Gpu("1", "NVIDIA Z9", (99, 0))
    assert peak_of_all([known, known], "bf16") == 2 * 989.4e12
    assert peak_of_all([known, unknown], "bf16") is None
    assert peak_of_all([], "bf16") is None
