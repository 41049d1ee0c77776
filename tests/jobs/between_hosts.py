"""The collectives between hosts against exact results: `between_hosts.py [ALGORITHM...]`.

With names of algorithms, each all-reduce is done by each of them; without, as the communicator chooses. Arrays are in
memory of their own and, where ranks share a host, in an arena. Values are small integers, whose sums every dtype here
holds exactly in whatever order they are added; so are means over a number of ranks that is a power of two.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mpipar.comm import Communicator, Grid, Mesh, run_job
from mpipar.comm.buffers import Op

SIZES = (0, 1, 7, 1000, 300_001)
DTYPES = (torch.float32, torch.bfloat16, torch.int64)

Place = Callable[[Tensor], Tensor]
"""Puts an array where the communicator shall find it."""


def main(world: Communicator) -> None:
    mesh = Mesh(world, Grid.of(world.size))
    names = world.all_gather_object(socket.gethostname())
    torch.set_num_threads(1)
    algorithms: list[str | None] = [*sys.argv[1:]] or [None]
    for place in places(world):
        for size in SIZES:
            for dtype in DTYPES:
                for algorithm in algorithms:
                    check_all_reduce(world, size, dtype, algorithm, place)
                check_the_others(world, size, dtype, place)
    world.barrier()
    if world.rank == 0:
        print(f"{mesh.num_hosts} hosts: {' '.join(names)}")
        print("RESULT ok", flush=True)


def places(world: Communicator) -> Iterator[Place]:
    yield torch.clone
    largest = max(SIZES) * 8
    arena = world.open_arena(largest)
    if not isinstance(arena, str):
        memory = arena.allocate(largest, torch.uint8, torch.device("cpu"))
        yield lambda x: memory[: x.numel() * x.itemsize].view(x.dtype).copy_(x)
        world.close_arena(arena)


def given(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """[size] what a rank brings; any rank can draw any other's."""
    return ((torch.arange(size) * (rank + 3) + 5 * rank) % 13 - 6).to(dtype)


def check_all_reduce(world: Communicator, size: int, dtype: torch.dtype, algorithm: str | None, place: Place) -> None:
    more: dict[str, Any] = {} if algorithm is None else {"algorithm": algorithm}
    all_given = torch.stack([given(rank, size, dtype) for rank in range(world.size)]).double()
    expected: dict[Op, Tensor] = {"sum": all_given.sum(0), "max": all_given.amax(0)}
    if dtype.is_floating_point:
        expected["mean"] = all_given.mean(0)
    for op, result in expected.items():
        x = place(given(world.rank, size, dtype))
        world.all_reduce(x, op, **more)
        require(torch.equal(x.double(), result), f"all_reduce({op}), {algorithm}", size, dtype)


def check_the_others(world: Communicator, size: int, dtype: torch.dtype, place: Place) -> None:
    total = torch.stack([given(rank, size, dtype) for rank in range(world.size)]).sum(0, dtype=dtype)
    mine = world.chunk(size)

    x = place(given(world.rank, size, dtype))
    world.reduce_scatter(x)
    require(torch.equal(x[mine], total[mine]), "reduce_scatter", size, dtype)

    x = torch.full((size,), -99, dtype=dtype)
    x[mine] = total[mine]
    x = place(x)
    world.all_gather(x)
    require(torch.equal(x, total), "all_gather", size, dtype)

    for root in (0, world.size - 1):
        x = place(given(world.rank, size, dtype))
        world.broadcast(x, root)
        require(torch.equal(x, given(root, size, dtype)), f"broadcast from {root}", size, dtype)


def require(good: bool, what: str, size: int, dtype: torch.dtype) -> None:
    if not good:
        raise ValueError(f"{what} of {size} elements of {dtype} is wrong")


if __name__ == "__main__":
    run_job(main)
