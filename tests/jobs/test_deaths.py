"""A rank is killed inside a collective: the job ends within seconds, and says who died; nothing is left of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mpipar.comm.environment import mpi_facts
from tests.jobs.launch import ROOT, Job, descendants

pytestmark = pytest.mark.timeout(120)

COLLECTIVES = [
    "arena",
    "slots",
    "blocking",
    "ring",
    "mpi",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "broadcast",
]
DYING = str(ROOT / "tests" / "jobs" / "dying.py")
ENDS_WITHIN_S = 10.0


def end(job: Job) -> float:
    """Seconds from the death to the end of the job."""
    job.wait_for("begun")
    begun = time.monotonic()
    job.finish()
    return time.monotonic() - begun


def gone(pids: list[int], time_limit_s: float = 5.0) -> bool:
    """Whether no process is left; what a killed parent leaves is reaped by the system, in its own time."""

    def alive(pid: int) -> bool:
        try:
            return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return False

    deadline = time.monotonic() + time_limit_s
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def shared_files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "mpipar" in name}


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_with_fault_tolerance_the_survivors_name_the_dead(collective: str) -> None:
    """As survivors they could go on; without `elastic` they say what happened, and leave."""
    if mpi_facts().fault_tolerance == "absent":
        pytest.skip("this MPI has no fault tolerance")
    before = shared_files()
    victim = 1 + len(collective) % 3
    job = Job(4, DYING, collective, str(victim), options=["--with-ft", "ulfm"])
    job.wait_for("begun")
    pids = descendants(job.process.pid)
    assert end(job) < ENDS_WITHIN_S
    said = [line for line in job.output if "mpipar:" in line]
    assert said and all(f"rank {victim} died" in line for line in said), job.text
    assert any("all_reduce" in line or collective in line for line in said)
    assert job.process.returncode != 0
    assert gone(pids)
    assert shared_files() == before


@pytest.mark.parametrize("collective", ["arena", "ring"])
def test_without_it_mpirun_ends_the_job(collective: str) -> None:
    job = Job(3, DYING, collective, "1")
    assert end(job) < ENDS_WITHIN_S
    assert job.process.returncode != 0
    assert "signal 9" in job.text and "rank 1" in job.text
