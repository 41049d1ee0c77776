"""On a real GPU, which all ranks of a host may share: `mpirun -n 2 python -m pytest -m gpu tests/gpu`.

Without one, or without CuPy, every test here is skipped for that reason (tests/conftest.py).
"""

from __future__ import annotations

import pytest
import torch

from mpipar.comm import Communicator
from tests.parallel.conftest import comm, pytest_configure, world

__all__ = ["comm", "pytest_configure", "world"]


@pytest.fixture
def device(comm: Communicator) -> torch.device:
    """This rank's GPU: ranks of a host take them in turn."""
    index = comm.rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
