"""The one import of mpi4py: what has to be settled before MPI starts is settled here."""

from __future__ import annotations

import os

import mpi4py

# One thread of a process makes MPI calls, not always the main one. MPI_THREAD_MULTIPLE would put locks around each.
mpi4py.rc.thread_level = "serialized"

# Open MPI spins while it waits. With more ranks than cores it has to hand the core to the rank it waits for; it reads
# this when it starts, so the only source for the number of ranks on this host is the launcher's environment.
_local_ranks = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
if _local_ranks > (os.cpu_count() or 1):
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")

from mpi4py import MPI  # noqa: E402

__all__ = ["MPI", "mpi_version"]


def mpi_version() -> str:
    """The library and its version, such as "Open MPI v5.0.11"."""
    first_line = MPI.Get_library_version().strip("\0 \n").splitlines()[0]
    return " ".join(first_line.partition(",")[0].replace("Version:", "").split())
