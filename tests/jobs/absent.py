"""Rank 1 does not come to a call in which MPI waits for it, and has no deadline: `absent.py CALL`."""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Callable

from mpipar.comm import Communicator, run_job
from mpipar.comm.mpi import MPI

WAITS_S = 2.0
call = sys.argv[1]


def stay_away() -> None:
    faulthandler.cancel_dump_traceback_later()
    time.sleep(1000)


def main(world: Communicator) -> None:
    world.progress.timeout_s = WAITS_S
    if call == "finalize":
        if world.rank == 1:
            MPI.Finalize = stay_away
        return
    calls: dict[str, Callable[[], object]] = {
        "split": lambda: world.split("half", color=0, key=world.rank),
        "duplicate": lambda: world.duplicate("twin"),
        "leave": lambda: None,
    }
    if world.rank == 1:
        stay_away()
    calls[call]()


if __name__ == "__main__":
    if call == "begin":
        if MPI.COMM_WORLD.rank == 1:
            stay_away()
        Communicator.world(timeout_s=WAITS_S)
    run_job(main)
