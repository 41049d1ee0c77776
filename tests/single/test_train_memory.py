"""Memory that is freed stays with the process, unless the user has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from mpipar.train.memory import keep_freed_memory
print(keep_freed_memory())
def step():
    return torch.ones(1 << 25).sum().item()  # 128 MiB
for _ in range(40):  # until the heap has found its shape
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**environ: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**clean, **environ}, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_what_was_freed_is_not_asked_for_again() -> None:
    kept, faults = page_faults()
    if not kept:
        pytest.skip("this C library is not GNU's")
    assert faults < 2 * 32_768, "it would be 4 * 32,768"


def test_the_user_s_own_setting_stays() -> None:
    kept, faults = page_faults(MALLOC_ARENA_MAX="4")
    assert not kept and faults > 4 * 1000
