"""What the cores of this host are, as Linux says in /proc/cpuinfo. Elsewhere little is known of them."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

# As x86 and Arm call matrix products of bfloat16.
_BF16 = {"amx_bf16", "avx512_bf16", "bf16"}


def processor_name(cpuinfo: Path = _CPUINFO) -> str:
    """What is sold, as "AMD EPYC 9654 96-Core Processor"; its architecture where that is not said."""
    return _first_core(cpuinfo).get("model name") or platform.processor() or platform.machine()


def bf16_is_fast(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether it multiplies bfloat16 matrices in hardware; without it autocast is a loss."""
    core = _first_core(cpuinfo)
    flags = core.get("flags") or core.get("Features", "")  # x86, Arm
    return not _BF16.isdisjoint(flags.split())


def _first_core(cpuinfo: Path) -> dict[str, str]:
    """What is said of the first core."""
    try:
        text = cpuinfo.read_text("utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
