"""Who the ranks of a communicator are, wherever it came from: found out once, when the job starts, and handed down.

So that making a communicator out of another asks nobody anything: among survivors of a failure every question is one
more in which somebody may die.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpipar.comm.mpi import MPI
from mpipar.comm.select import AllReduce, agreed, wish


@dataclass(frozen=True)
class Roster:
    """The ranks of a communicator.

    Args:
        origins: By rank, the rank in the job as it started.
        hosts: By rank, a number for the host that it is on.
        wants: Which all-reduce the user's environment asks for.
    """

    origins: tuple[int, ...]
    hosts: tuple[int, ...]
    wants: AllReduce

    @classmethod
    def take(cls, comm: MPI.Comm) -> Roster:
        """Collective, when the job starts. Ranks are on one host if MPI says that they can share memory.

        Raises:
            ConfigError: Ranks were asked for different algorithms.
        """
        local = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
        hosts, wishes = zip(*comm.allgather((local.bcast(comm.rank), wish())), strict=True)
        local.Free()
        return cls(tuple(range(comm.size)), hosts, agreed(wishes))

    def among(self, ranks: Sequence[int]) -> Roster:
        """Of a communicator whose rank i was rank `ranks[i]` in this one."""
        return Roster(tuple(self.origins[r] for r in ranks), tuple(self.hosts[r] for r in ranks), self.wants)
