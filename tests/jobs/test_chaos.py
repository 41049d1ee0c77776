"""A few of the runs of `python -m tests.jobs.chaos`."""

from __future__ import annotations

import pytest

from mpipar.comm.environment import mpi_facts
from tests.jobs.chaos import TIME_LIMIT_S, Arena, describe

RUNS = 20

pytestmark = pytest.mark.timeout(TIME_LIMIT_S + 60)


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    if mpi_facts().fault_tolerance == "absent":
        pytest.skip("this MPI has no fault tolerance")
    return Arena(tmp_path_factory.mktemp("chaos"), ranks=4)


@pytest.mark.parametrize("seed", range(1, RUNS + 1))
def test_it_comes_to_the_right_end(arena: Arena, seed: int) -> None:
    verdict = arena.play(seed)
    assert verdict.right, f"{describe(verdict)}\n{arena.output}"
