"""Messages between ranks. The only package that imports mpi4py or CuPy.

communicator    the operations, as the rest of mpipar calls them
mesh            ranks along named axes
job             how a command starts, agrees on errors, and ends

select          which all-reduce for which array
  shared          in the memory of one host: in the arena, or through slots
  hierarchical    shared on each host, rings between hosts
  ring            all-reduce, reduce-scatter, all-gather and broadcast in messages
  native          MPI's own
exchange        all-to-all

host            where the ranks of a host meet
arena           memory that they share
sums            additions and copies, planned once
small           the sum of a small array, compiled
compiled        what is written in C
exact           sums that do not round
topology        which ranks share a host
roster          who the ranks of a communicator are
p2p             posting messages: tags, sizes, counts
failure         going on without ranks that died
watchdog        ends ranks that hang
call            what a rank called, compared between ranks
prepared        what is called again with the same tensor
progress        what moves and completes it all
roll_call       who is there, when nothing moves
buffers         from an array to bytes and values
environment     what this machine's MPI and launcher are
mpi             the import of mpi4py
"""

from mpipar.comm.communicator import Communicator
from mpipar.comm.failure import attempt, can_survive, part, start_watchdog, survivors
from mpipar.comm.job import agreement, decide_on_root, run_job, terminal_device
from mpipar.comm.mesh import Grid, Mesh
from mpipar.comm.mpi import mpi_version
from mpipar.comm.progress import Work
from mpipar.comm.roll_call import names

__all__ = [
    "Communicator",
    "Grid",
    "Mesh",
    "Work",
    "agreement",
    "attempt",
    "can_survive",
    "decide_on_root",
    "mpi_version",
    "names",
    "part",
    "run_job",
    "start_watchdog",
    "survivors",
    "terminal_device",
]
