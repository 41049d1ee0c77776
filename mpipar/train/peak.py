"""How fast a GPU could multiply matrices at best, for the model FLOP utilisation (MFU) of a run.

In 10^12 floating-point operations a second, dense, added up in float32: from the makers' data sheets, whose figures
with sparsity are halved. Chowdhery et al., "PaLM", 2022, appendix B, has MFU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mpipar.train.config import PrecisionName
from mpipar.train.device import Gpu

# Name, as a run of words in what CUDA calls the device: bf16 and fp16, tf32, fp32. The first that fits is taken.
_TFLOPS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "B200": (2250, 1125, 75),
        "GH200": (989.4, 494.7, 67),
        "H200 NVL": (835.5, 417.7, 60),
        "H200": (989.4, 494.7, 67),
        "H100 PCIe": (756, 378, 51),
        "H100 NVL": (835.5, 417.7, 60),
        "H100": (989.4, 494.7, 67),
        "A100": (312, 156, 19.5),
        "A40": (149.7, 74.8, 37.4),
        "A30": (165, 82, 10.3),
        "A10": (125, 62.5, 31.2),
        "L40S": (362, 183, 91.6),
        "L40": (181, 90.5, 90.5),
        "L4": (121, 60, 30.3),
        "RTX 6000 Ada": (364.2, 182.1, 91.1),
        "RTX 4090": (165.2, 82.6, 82.6),
        "RTX 3090": (71, 35.6, 35.6),
        "V100-SXM2": (125, 0, 15.7),
        "V100": (112, 0, 14),
        "T4": (65, 0, 8.1),
    }
)
# Of the same name, and slower: parts of a GPU, and those of notebooks.
_OTHERS = re.compile(r"\bMIG\b|\bLaptop\b|\bMax-Q\b|\bRTX 4090 D\b")


def peak_flops(name: str, precision: PrecisionName) -> float | None:
    """Of one GPU, in operations a second; None if it is not in the table.

    Args:
        name: As CUDA calls it.
        precision: Of the products, resolved.
    """
    if _OTHERS.search(name):
        return None
    for words, (half, tf32, fp32) in _TFLOPS.items():
        if re.search(rf"\b{re.escape(words)}\b", name):
            tflops = {"tf32": tf32, "fp32": fp32}.get(precision, half)
            return tflops * 1e12 if tflops else None
    return None


def peak_of_all(gpus: Sequence[Gpu], precision: PrecisionName) -> float | None:
    """Of several together; None if one of them is not known."""
    peaks = [peak_flops(gpu.name, precision) for gpu in gpus]
    return sum(peak for peak in peaks if peak is not None) if gpus and None not in peaks else None
