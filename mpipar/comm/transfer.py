"""`mpirun -n 2 python -m mpipar.comm.transfer cupy`: rank 0 sends an array to rank 1, which says that it arrived.

A program of its own, because an MPI library that cannot read the memory of a GPU may end the process that asks it to.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module

from mpipar.comm.mpi import MPI

ELEMENTS = 1 << 20  # past the size up to which MPI libraries copy messages through buffers of their own


def main(library: str) -> None:
    xp = import_module(library)
    world = MPI.COMM_WORLD
    if world.size != 2:
        sys.exit(f"this needs 2 ranks, not {world.size}")
    x = xp.arange(ELEMENTS, dtype="float32") if world.rank == 0 else xp.zeros(ELEMENTS, "float32")
    # Without a deadline of its own: who started this program has one (`environment.try_transfer`).
    synchronise = xp.cuda.Device().synchronize if library == "cupy" else (lambda: None)
    synchronise()
    world.Barrier()
    begin = time.perf_counter()
    if world.rank == 0:
        world.Send(x, 1)
    else:
        world.Recv(x, 0)
        synchronise()
        taken_s = time.perf_counter() - begin
        if not bool((x == xp.arange(ELEMENTS, dtype="float32")).all()):
            sys.exit("what arrived is not what was sent")
        print(f"arrived: {x.nbytes >> 20} MiB in {taken_s * 1e3:.1f} ms", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
