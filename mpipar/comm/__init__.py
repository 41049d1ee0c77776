"""Messages between ranks. The only package that imports mpi4py or CuPy.

communicator    the operations, as the rest of mpipar calls them
operations      what a call comes to
mesh            ranks along named axes
cores           how many a rank has
job             how a command starts, agrees on errors, and ends

select          which all-reduce for which array
  shared          in the memory of one host: in the arena, or through slots
  hierarchical    shared on each host, rings between hosts
  ring            all-reduce, reduce-scatter, all-gather and broadcast in messages
  native          MPI's own
exchange        all-to-all

memory          what the ranks of a communicator share on each host
  host            where they meet
  arena           where their arrays lie
  segment         memory of one process that others open
sums            additions and copies, planned once
adding          sums over several arrays in one pass, compiled
one_call        sums on a host, compiled
exact           sums that do not round
topology        which ranks share a host
roster          who the ranks of a communicator are
p2p             posting messages: tags, sizes, counts
failure         going on without ranks that died
watchdog        ends ranks that hang
deadline        ends a process in which a call of MPI hangs
call            what a rank called, compared between ranks
prepared        what is called again with the same tensor
pending         what an algorithm waits for: messages, neighbours
lane            what has been started on a communicator
progress        what moves it all
roll_call       who is there, when nothing moves
buffers         from an array to bytes and values
device/         arrays on GPUs: the same collectives there, and what messages of them are made of
wishes          what the environment asks for, the same on all ranks
environment     what this machine's MPI and launcher are
mpi             the import of mpi4py
"""

from mpipar.comm.communicator import Communicator
from mpipar.comm.cores import cores_per_rank
from mpipar.comm.environment import can_survive, usable_cores
from mpipar.comm.failure import attempt, part, start_watchdog, survivors
from mpipar.comm.job import agreement, decide_on_root, run_job, terminal_device
from mpipar.comm.lane import Work
from mpipar.comm.mesh import Grid, Mesh
from mpipar.comm.mpi import mpi_version
from mpipar.comm.roll_call import names

__all__ = [
    "Communicator",
    "Grid",
    "Mesh",
    "Work",
    "agreement",
    "attempt",
    "can_survive",
    "cores_per_rank",
    "decide_on_root",
    "mpi_version",
    "names",
    "part",
    "run_job",
    "start_watchdog",
    "survivors",
    "terminal_device",
    "usable_cores",
]
