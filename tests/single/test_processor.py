"""What is read from /proc/cpuinfo."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from mpipar.processor import bf16_is_fast, processor_name

X86 = """processor\t: 0
model name\t: Some(R) Processor: 8 Cores
flags\t\t: fpu avx512f {flag} amx_tile
bugs\t\t: spectre_v1

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd sve {flag}
CPU part\t: 0xd40

processor\t: 1
"""
OTHER = "processor\t: 0\ncpu\t\t: POWER9, altivec supported\n"


@pytest.mark.parametrize(
    ("text", "flag", "name", "fast"),
    [
        (X86, "avx512_bf16", "Some(R) Processor: 8 Cores", True),
        (X86, "amx_bf16", "Some(R) Processor: 8 Cores", True),
        (X86, "avx512_fp16", "Some(R) Processor: 8 Cores", False),
        (ARM, "bf16", None, True),
        (ARM, "i8mm", None, False),
        (OTHER, "", None, False),
        ("", "", None, False),
    ],
)
def test_what_is_said_of_the_first_core(text: str, flag: str, name: str | None, fast: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text.replace("{flag}", flag))
    assert processor_name(cpuinfo) == (name or platform.processor() or platform.machine())
    assert bf16_is_fast(cpuinfo) == fast


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert processor_name(tmp_path / "nix") == (platform.processor() or platform.machine())
    assert not bf16_is_fast(tmp_path / "nix")


def test_this_processor_has_a_name() -> None:
    assert processor_name()
