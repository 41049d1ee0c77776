"""What holds for all tests."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache

# Before torch is imported: several engineers, or several ranks, test on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run and on every rank, and no opinion on the speed of a machine that may be busy. A fixture
# that all examples of a test share is meant: a folder, a communicator.
settings.register_profile(
    "mpipar",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("mpipar")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none, or no CuPy for it."""
    for item in items:
        if item.get_closest_marker("gpu") is not None and (reason := what_a_gpu_test_misses()) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@lru_cache(maxsize=1)
def what_a_gpu_test_misses() -> str | None:
    """What is missing here."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device"
    cuda, errors = importlib.import_module("mpipar.comm.device.cuda"), importlib.import_module("mpipar.errors")
    try:
        cuda.open_gpu(0)
    except errors.ConfigError as error:
        return f"CuPy is missing: {error}"
    return None
