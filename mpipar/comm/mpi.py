"""The one import of mpi4py: what has to be settled before MPI starts is settled here."""

from __future__ import annotations

import os

import mpi4py

# One thread of a process makes MPI calls at a time, not always the main one: on a GPU torch runs backward, and so the
# hooks that start reductions, on a thread of its own, while the main one waits for it. MPI_THREAD_MULTIPLE would put
# locks around each call.
mpi4py.rc.thread_level = "serialized"

# Open MPI spins while it waits. With more ranks than cores it has to hand the core to the rank it waits for; it reads
# this when it starts, so the only source for the number of ranks on this host is the launcher's environment.
_local_ranks = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
if _local_ranks > (os.cpu_count() or 1):
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")

# A supervisor gives MPI's shared memory a folder of its own, so that it can be removed after a crash. Open MPI does
# not make it, and without it does not share memory.
_SHARED_MEMORY = "OMPI_MCA_btl_sm_backing_directory"
if _SHARED_MEMORY in os.environ:
    os.makedirs(os.environ[_SHARED_MEMORY], exist_ok=True)

# A process that no launcher has started is a job of its own. Open MPI would all the same make memory for messages to
# others on this host, and leave its file in /dev/shm, and look for a second for networks.
_TRANSPORTS = "OMPI_MCA_btl"
_alone = not {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", _TRANSPORTS} & os.environ.keys()
if _alone:
    os.environ[_TRANSPORTS] = "self"

from mpi4py import MPI  # noqa: E402

if _alone:
    del os.environ[_TRANSPORTS]  # it is not for the jobs that this process may start

__all__ = ["MPI", "mpi_version"]


def mpi_version() -> str:
    """The library and its version, such as "Open MPI v5.0.11"."""
    first_line = MPI.Get_library_version().strip("\0 \n").splitlines()[0]
    return " ".join(first_line.partition(",")[0].replace("Version:", "").split())
