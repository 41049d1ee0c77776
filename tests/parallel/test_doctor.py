"""The doctor looks at the job that this suite runs in."""

from __future__ import annotations

from pathlib import Path

from mpipar.comm import Communicator
from mpipar.comm.environment import GpuTransfer
from mpipar.doctor.facts import folder_facts, rank_facts
from mpipar.doctor.findings import judge


def test_this_job(comm: Communicator, shared_path: Path) -> None:
    ranks = comm.all_gather_object(rank_facts(comm))
    findings = list(judge(ranks, folder_facts(shared_path), GpuTransfer("untried", "no CUDA device")))
    assert [str(finding) for finding in findings if finding.mark == "bad"] == []
    assert any(f"{comm.size} rank" in finding.text for finding in findings)
    assert all(rank.sees_folder and rank.cores_per_rank >= 1 for rank in ranks)
