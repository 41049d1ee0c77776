"""Messages between ranks. The only package that imports mpi4py or CuPy.

communicator    the operations, as the rest of mpipar calls them
mesh            ranks along named axes
job             how a command starts, agrees on errors, and ends
ring            the collectives, by hand
shared          the arena: reducing in place in shared memory
p2p             posting messages: tags, sizes, counts
progress        what completes them
buffers         from an array to bytes and values
environment     what this machine's MPI and launcher are
mpi             the import of mpi4py
"""

from mpipar.comm.communicator import Communicator
from mpipar.comm.job import agreement, decide_on_root, run_job, terminal_device
from mpipar.comm.mesh import Grid, Mesh
from mpipar.comm.mpi import mpi_version
from mpipar.comm.progress import Work

__all__ = [
    "Communicator",
    "Grid",
    "Mesh",
    "Work",
    "agreement",
    "decide_on_root",
    "mpi_version",
    "run_job",
    "terminal_device",
]
