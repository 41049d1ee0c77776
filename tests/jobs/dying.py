"""Each collective again and again, until one rank kills itself inside one: `dying.py COLLECTIVE RANK`.

The rank dies after it has begun, while others wait for it or for what it would have sent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import torch

from mpipar.comm import Communicator, Work, run_job

ELEMENTS = 1 << 18


def main(world: Communicator) -> None:
    collective, victim = sys.argv[1], int(sys.argv[2])
    arena = world.open_arena(4 * ELEMENTS)
    assert not isinstance(arena, str), arena
    shared = arena.allocate(ELEMENTS, torch.float32, torch.device("cpu"))
    private, into = torch.ones(ELEMENTS), torch.empty(ELEMENTS)
    start: dict[str, Callable[[], Work]] = {
        "arena": lambda: world.start_all_reduce(shared),
        "slots": lambda: world.start_all_reduce(private, algorithm="shared"),
        "ring": lambda: world.start_all_reduce(private, algorithm="ring"),
        "mpi": lambda: world.start_all_reduce(private, algorithm="mpi"),
        "reduce_scatter": lambda: world.start_reduce_scatter(private),
        "all_gather": lambda: world.start_all_gather(private),
        "all_to_all": lambda: world.start_all_to_all(private, into),
        "broadcast": lambda: world.start_broadcast(private),
    }
    for _ in range(3):
        start[collective]().wait()
    print("begun", flush=True)
    while True:
        work = start[collective]()
        if world.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        work.wait()


if __name__ == "__main__":
    run_job(main)
