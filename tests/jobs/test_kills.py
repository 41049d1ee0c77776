"""A few of the kills of `python -m tests.jobs.kills`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpipar.comm.environment import mpi_facts
from tests.jobs.kills import Victim

KILLS = 10


@pytest.mark.timeout(240)
@pytest.mark.skipif(mpi_facts().fault_tolerance == "absent", reason="this MPI has no fault tolerance")
def test_what_is_listed_is_whole_whenever_ranks_are_killed(tmp_path: Path) -> None:
    score = Victim(tmp_path).play(KILLS, seed=1)
    assert not score.faults and score.kills == KILLS, score
