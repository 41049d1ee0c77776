"""On a real GPU, which all ranks of a host may share: `mpirun -n 2 python -m pytest -m gpu tests/gpu`.

Without one, or without CuPy, every test here is skipped for that reason.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from mpipar.errors import ConfigError
from tests.parallel.conftest import comm, pytest_configure, world

__all__ = ["comm", "pytest_configure", "world"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = what_is_missing()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing is not None:
                item.add_marker(pytest.mark.skip(reason=missing))


@lru_cache(maxsize=1)
def what_is_missing() -> str | None:
    """Why nothing can run here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        importlib.import_module("mpipar.comm.device.cuda").open_gpu(0)
    except ConfigError as error:
        return f"CuPy is missing: {error}"
    return None


@pytest.fixture
def device(comm: object) -> torch.device:
    """This rank's GPU: ranks of a host take them in turn."""
    index = getattr(comm, "rank", 0) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
