"""Going on without the dead, in a job under `mpirun --with-ft ulfm`: vote, revoke, shrink.

A rank that waits for a dead one gets a DeadRankError, within milliseconds; one that computes gets it when it next
waits; some may get none, and think that all is well. So what ranks do together is done in attempts, and each ends with
a vote of the living, which comes to the same end on all of them, whoever dies in it. Only then does anything change
that matters.

    attempt      this rank came to its end                  or a DeadRankError: then whatever any rank still waits for
                                                            is revoked, on all communicators, so that all come to vote
    vote         all did, and nobody died                   or LostRanksError, on all
    survivors    the living agree on who they are (shrink), build what they need, and vote on that; if somebody dies
                 meanwhile, once more from the top

Bland, Bouteiller, Herault, Bosilca & Dongarra, "Post-failure recovery of MPI communication capability", IJHPCA 2013.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from mpipar.comm.communicator import Communicator
from mpipar.comm.deadline import deadline
from mpipar.comm.environment import can_survive
from mpipar.comm.mpi import MPI
from mpipar.comm.progress import Progress
from mpipar.comm.roll_call import is_failure
from mpipar.comm.watchdog import Watch
from mpipar.errors import DeadRankError, LostRanksError

Result = TypeVar("Result")


def attempt(world: Communicator, action: Callable[[], Result]) -> Result:
    """Collective: what `action` returns, if it came to its end on all ranks and all are alive.

    It communicates, and changes nothing that could not be done again. Where ranks cannot be survived it is just called.

    Args:
        world: All ranks of the job.
        action: On this rank.

    Raises:
        LostRanksError: On all ranks: some died. No communicator can be used any more; call `survivors`.
    """
    if not can_survive():
        return action()
    return _voted(world.mpi, world.progress, action)


def survivors(world: Communicator, build: Callable[[Communicator], Result]) -> Result:
    """Collective between the living: what `build` makes of the communicator that is left of `world`.

    What operations under way were to write into has no defined content.

    Args:
        world: All ranks of the job so far.
        build: Called with the survivors; again with fewer, if somebody dies while it runs.
    """
    comm = world.mpi
    while True:
        world.progress.abandon()
        comm = _shrink(comm, world.progress)
        try:
            return _voted(comm, world.progress, partial(_build, world, comm, build))
        except LostRanksError:
            continue


def start_watchdog(world: Communicator, timeout_s: float) -> str | None:
    """Collective: has ranks that hang killed, so that they can be survived.

    Args:
        world: All ranks of the job.
        timeout_s: How long one may give no sign of life.

    Returns:
        Why nobody can watch, on all ranks.
    """
    neighbours = world.topology.neighbours(world.rank)
    memory = world.share_file(Watch.num_bytes(len(neighbours)))
    if isinstance(memory, str):
        return memory
    watch = Watch(memory)
    world.progress.pulse = watch.pulse(neighbours.index(world.rank))
    if world.rank == neighbours[0]:
        watch.start(timeout_s)
    return None


def part(world: Communicator) -> None:
    """Collective, at the end: nobody leaves before all have come, or some have died.

    Who comes has done what it was to do on its GPU in memory of others, which is gone when they leave.

    Raises:
        StallError: Some did not come in time, or a GPU has not done what it was given.
    """
    try:
        world.finish_gpus()
        if not world.mpi.Is_revoked():
            world.barrier()
    except (DeadRankError, MPI.Exception):
        return


def _build(world: Communicator, comm: MPI.Comm, build: Callable[[Communicator], Result]) -> Result:
    return build(world.derive(comm, "world"))


def _voted(comm: MPI.Comm, progress: Progress, action: Callable[[], Result]) -> Result:
    results: list[Result] = []
    trouble: Exception | None = None
    try:
        results.append(action())
    except DeadRankError as error:
        trouble = error
    except MPI.Exception as error:
        if not is_failure(error):
            raise
        trouble = error
    if trouble is not None:
        progress.abandon()
        comm.Revoke()
    if not _vote(comm, progress, trouble is None):
        raise LostRanksError("ranks died") from trouble
    return results[0]


def _vote(comm: MPI.Comm, progress: Progress, done: bool) -> bool:
    """Whether all voted for it, and nobody died: the same on all ranks."""
    try:
        # Iagree and Ishrink, which could be given up, do not survive a death themselves in Open MPI 5.0.
        with progress.pulse.silent(), deadline(progress.timeout_s, "MPI_Comm_agree, a vote on what was attempted"):
            return bool(comm.Agree(int(done)))
    except MPI.Exception as error:
        if not is_failure(error):
            raise
        return False


def _shrink(comm: MPI.Comm, progress: Progress) -> MPI.Comm:
    """The communicator of those that are alive."""
    comm.Revoke()
    with progress.pulse.silent(), deadline(progress.timeout_s, "MPI_Comm_shrink, to go on without the dead"):
        smaller = comm.Shrink()
    smaller.Set_errhandler(MPI.ERRORS_RETURN)
    return smaller
