"""What holds for all tests."""

from __future__ import annotations

import os

# Before torch is imported: several engineers, or several ranks, test on the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
