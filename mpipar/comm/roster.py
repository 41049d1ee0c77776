"""Who the ranks of a communicator are, wherever it came from: found out once, when the job starts, and handed down.

So that making a communicator out of another asks nobody anything: among survivors of a failure every question is one
more in which somebody may die.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

from mpipar.comm import one_call, select
from mpipar.comm.device import transport
from mpipar.comm.device.transport import Transport
from mpipar.comm.environment import try_gpu_transfer, usable_cores
from mpipar.comm.mpi import MPI
from mpipar.comm.select import AllReduce
from mpipar.comm.wishes import agreed, wish
from mpipar.errors import ConfigError


@dataclass(frozen=True)
class Roster:
    """The ranks of a communicator.

    Args:
        origins: By rank, the rank in the job as it started.
        hosts: By rank, a number for the host that it is on.
        wants: Which all-reduce the user's environment asks for.
        transport: What carries arrays on GPUs, as it asks for it.
        compiled: By rank, whether it has meeting.c, for sums on a host in one call. Where one lacks it, none passes
            ordinary memory that way.
        cores: By rank, the cores that it may use.
    """

    origins: tuple[int, ...]
    hosts: tuple[int, ...]
    wants: AllReduce
    transport: Transport
    compiled: tuple[bool, ...]
    cores: tuple[frozenset[int], ...]

    @classmethod
    def take(cls, comm: MPI.Comm) -> Roster:
        """Collective, when the job starts. Ranks are on one host if MPI says that they can share memory.

        Raises:
            ConfigError: Ranks were asked for different things, or for what this MPI cannot do.
        """
        local = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
        mine = (
            local.bcast(comm.rank),
            wish(select.VARIABLE),
            wish(transport.VARIABLE),
            one_call.is_built(),
            usable_cores(),
        )
        hosts, algorithms, transports, compiled, cores = zip(*comm.allgather(mine), strict=True)
        local.Free()
        algorithm = cast(AllReduce, agreed(select.VARIABLE, get_args(AllReduce), algorithms))
        carrier = cast(Transport, agreed(transport.VARIABLE, get_args(Transport), transports))
        if carrier == "mpi":
            _require_gpu_transfer(comm)
        return cls(tuple(range(comm.size)), hosts, algorithm, carrier, compiled, tuple(map(frozenset, cores)))

    def among(self, ranks: Sequence[int]) -> Roster:
        """Of a communicator whose rank i was rank `ranks[i]` in this one."""
        return replace(
            self,
            origins=tuple(self.origins[r] for r in ranks),
            hosts=tuple(self.hosts[r] for r in ranks),
            compiled=tuple(self.compiled[r] for r in ranks),
            cores=tuple(self.cores[r] for r in ranks),
        )

    def is_crowded(self, ranks: Sequence[int]) -> bool:
        """Whether these ranks, which are on one host, have fewer cores than they are."""
        return len(frozenset().union(*(self.cores[r] for r in ranks))) < len(ranks)


def _require_gpu_transfer(comm: MPI.Comm) -> None:
    """Collective: an MPI that cannot read a GPU's memory crashes, or sends something else; so it is tried elsewhere."""
    tried = comm.bcast(try_gpu_transfer() if comm.rank == 0 else None)
    if tried.result != "works":
        raise ConfigError(
            f"{transport.VARIABLE}=mpi, but this MPI was not seen to take an array on a GPU: {tried.detail}. Leave the "
            "variable out, and arrays go through memory that the ranks share, or that of the host"
        )
