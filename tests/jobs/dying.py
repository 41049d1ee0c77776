"""Each collective again and again, until one rank kills itself inside one: `dying.py COLLECTIVE RANK`.

The rank dies after it has begun, while others wait for it or for what it would have sent.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

import torch

from mpipar.comm import Communicator, Work, run_job

ELEMENTS = 1 << 18


def main(world: Communicator) -> None:
    collective, victim = sys.argv[1], int(sys.argv[2])
    arena = world.open_arena(4 * ELEMENTS)
    assert not isinstance(arena, str), arena
    shared = arena.allocate(ELEMENTS, torch.float32, torch.device("cpu"))
    private, into, large = torch.ones(ELEMENTS), torch.empty(ELEMENTS), torch.ones(16 * ELEMENTS)
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
    if collective == "blocking":  # one call after the other; the signal comes in one of them
        world.all_reduce(large)
        print("begun", flush=True)
        if world.rank == victim:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            world.all_reduce(large)
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
