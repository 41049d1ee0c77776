"""Going on without the dead: revoke, shrink, agree. In a job under `mpirun --with-ft ulfm`.

A rank that waits for a dead one gets a DeadRankError, within milliseconds; one that computes gets it when it next
waits. Whoever gets it calls `survivors`:

    revoke     whatever any rank waits for, on any communicator, ends in an error too, so all come here
    shrink     the living agree on who they are, and have a communicator of their own
    build      hosts and shared memory are found anew; if somebody dies meanwhile, once more from the top

`Communicator.vote` comes before the weights change. Its outcome is the same on all ranks, even if some die in it.

Bland, Bouteiller, Herault, Bosilca & Dongarra, "Post-failure recovery of MPI communication capability", IJHPCA 2013.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from mpipar.comm.communicator import Communicator
from mpipar.comm.environment import ULFM_IS_ON
from mpipar.comm.mpi import MPI
from mpipar.comm.roll_call import is_failure
from mpipar.errors import DeadRankError, StallError

Result = TypeVar("Result")


def can_survive() -> bool:
    """Whether this job was started to go on without ranks that die."""
    return os.environ.get(ULFM_IS_ON) == "1"


def survivors(world: Communicator, build: Callable[[Communicator], Result]) -> Result:
    """Collective between the living: what `build` makes of the communicator that is left.

    Every communicator of the job is dead after this, and so is every operation under way; what they were to write into
    has no defined content.

    Args:
        world: All ranks of the job so far.
        build: Called with the survivors; again with fewer, if somebody dies while it runs.

    Raises:
        StallError: A rank that is alive did not come.
    """
    progress = world.progress
    comm = world.mpi
    while True:
        progress.abandon()
        comm = _shrink(comm, progress.timeout_s)
        try:
            return build(world.derive(comm, "world"))
        except DeadRankError:
            pass
        except MPI.Exception as error:
            if not is_failure(error):
                raise


def _shrink(comm: MPI.Comm, timeout_s: float) -> MPI.Comm:
    """The communicator of those that are alive."""
    comm.Revoke()
    smaller, request = comm.Ishrink()
    deadline = time.monotonic() + timeout_s
    while not request.Test():
        if time.monotonic() > deadline:
            raise StallError(
                f"after the death of a rank nothing moved for {timeout_s:.0f} s: a rank that is alive does not come to "
                "go on without it. Look at the output of the ranks; --comm.timeout-s makes the wait longer"
            )
        time.sleep(0.0002)
    smaller.Set_errhandler(MPI.ERRORS_RETURN)
    return smaller
