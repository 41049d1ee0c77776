"""One suite, the same on any number of ranks: `mpirun -n 4 python -m pytest tests/parallel`.

Every rank runs every test; `agreement` makes them one. Nothing waits for ever: in a test, an operation whose peer is
silent raises a StallError after `STALL_S`, and a test as a whole has pytest-timeout's limit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from mpipar.comm import Communicator
from tests.parallel.agreement import FAILED, Agreement
from tests.parallel.gpus import careful, carried, device, views, way

__all__ = ["careful", "carried", "device", "views", "way"]

STALL_S = 20.0

# Between ranks an example is a collective operation: one rank cannot go looking for a smaller one alone.
settings.register_profile("ranks", settings.get_profile("mpipar"), phases=[Phase.explicit, Phase.generate])


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.has_plugin("agreement"):  # tests/gpu has begun
        return
    ranks = Communicator.world(timeout_s=600.0)  # longer than any test may take
    config.pluginmanager.register(Agreement(ranks), "agreement")
    _keep_temporary_folders_apart(ranks.rank)
    if ranks.size > 1:
        settings.load_profile("ranks")
    if ranks.rank > 0:
        config.pluginmanager.unregister(name="terminalreporter")


def _keep_temporary_folders_apart(rank: int) -> None:
    """pytest numbers its folders and tidies up old ones; ranks that do so in one place get in each other's way."""
    root = Path(tempfile.gettempdir()) / f"mpipar-tests-of-{os.getuid()}" / f"rank-{rank}"
    root.mkdir(parents=True, exist_ok=True)
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(root)


@pytest.fixture(scope="session")
def world() -> Communicator:
    """All ranks of the job."""
    return Communicator.world(timeout_s=STALL_S)


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> Iterator[Communicator]:
    """All ranks of the job, for this test alone: what a failed test leaves under way is not in the way of the next."""
    comm = Communicator.world(timeout_s=STALL_S)
    yield comm
    if FAILED not in request.node.stash:
        comm.free()


@pytest.fixture
def shared_path(world: Communicator, request: pytest.FixtureRequest) -> Path:
    """An empty folder for this test, the same on all ranks."""
    path = request.getfixturevalue("tmp_path") if world.rank == 0 else None
    return Path(world.broadcast_object(path))
