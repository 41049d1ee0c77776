"""The command `python -m mpipar.doctor`: a finding a line, what to do under it; exit code 1 if one is bad."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mpipar.comm import Communicator, decide_on_root, run_job
from mpipar.comm.environment import launcher_mismatch, mpi_facts, read_launch, try_gpu_transfer
from mpipar.command_line import parse
from mpipar.doctor.facts import folder_facts, rank_facts
from mpipar.doctor.findings import Finding, judge


@dataclass(frozen=True)
class Doctor:
    """Says what this machine offers for training, what will bite, and what to do about it.

    Alone it looks at this process; under mpirun at all ranks and hosts. The exit code is 1 if anything is bad.
    """


def main(world: Communicator) -> int:
    decide_on_root(world, lambda: parse(Doctor, "python -m mpipar.doctor"))
    mismatch = launcher_mismatch(os.environ, world.size, mpi_facts().library)
    if mismatch is not None:
        launch = read_launch(os.environ)
        if launch is None or launch.rank == 0:  # the others would say the same
            print(Finding("bad", *mismatch))
        return 1
    ranks = world.all_gather_object(rank_facts(world))
    code = 0
    if world.rank == 0:
        findings = list(judge(ranks, folder_facts(Path.cwd()), try_gpu_transfer()))
        print("\n".join(map(str, findings)), flush=True)
        code = int(any(finding.mark == "bad" for finding in findings))
    return int(world.broadcast_object(code))


if __name__ == "__main__":
    run_job(main, singletons=True)
