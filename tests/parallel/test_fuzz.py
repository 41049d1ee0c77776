"""Thousands of random cases against float64, and ten thousand calls that leave nothing behind."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mpipar.comm import Communicator, hierarchical, ring
from mpipar.comm.arena import Arena
from mpipar.comm.select import AllReduce

CASES = 3000
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]
COLLECTIVES = ["all_reduce", "all_reduce", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"]
ROUNDOFF = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
CALLS = 10_000


class Case:
    """One random call. All ranks draw the same one, and what each of them brings."""

    def __init__(self, seed: int, num_ranks: int):
        rng = random.Random(seed)
        self.seed = seed
        self.collective = rng.choice(COLLECTIVES)
        self.dtype = rng.choice(DTYPES)
        self.size = rng.choice(
            [rng.randrange(8), rng.randrange(300), rng.randrange(40_000), 131_072 + rng.randrange(3)]
        )
        ops = ["sum", "max", "mean"] if self.dtype.is_floating_point else ["sum", "max"]
        self.op = rng.choice(ops)
        self.algorithm: AllReduce = rng.choice(["auto", "ring", "shared", "mpi"])
        self.in_arena = rng.random() < 0.5
        self.contiguous = rng.random() < 0.8
        self.root = rng.randrange(num_ranks)
        self.segment_bytes = rng.choice([8, 1000, 1 << 16, 2 << 20]) if self.size < 300 else 1 << 16
        cuts = sorted(rng.randrange(self.size + 1) for _ in range(num_ranks - 1))
        self.sizes = [b - a for a, b in zip([0, *cuts], [*cuts, self.size], strict=True)]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())

    def given(self, rank: int) -> Tensor:
        """[size] float64: values that every dtype has; sums of integers fit the smallest."""
        rng = np.random.default_rng([self.seed, rank])
        if self.dtype.is_floating_point:
            return torch.from_numpy(rng.integers(-127, 128, self.size) / 16.0)
        return torch.from_numpy(rng.integers(0, 30, self.size).astype(np.float64))

    def reduced(self, num_ranks: int) -> tuple[Tensor, Tensor]:
        """The result in float64, and how far from it additions in the dtype may end."""
        every = torch.stack([self.given(rank) for rank in range(num_ranks)])
        result = {"sum": every.sum(0), "mean": every.mean(0), "max": every.amax(0)}[self.op]
        bound = ROUNDOFF.get(self.dtype, 0.0) * (num_ranks + 1) * every.abs().sum(0)
        return result, torch.zeros_like(bound) if self.op == "max" else bound


def test_random_cases(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    memory = None
    arena = comm.open_arena(1 << 21)
    if isinstance(arena, Arena):
        memory = arena.allocate(1 << 21, torch.uint8, torch.device("cpu"))
    for seed in range(CASES // comm.size):
        case = Case(seed, comm.size)
        for module in (ring, hierarchical):
            for name in ("all_reduce", "reduce_scatter", "all_gather", "broadcast"):
                function = getattr(module, name, None)
                if function is not None:
                    kept = getattr(function, "__defaults__", None)
                    assert kept
                    monkeypatch.setattr(function, "__defaults__", (*kept[:-1], case.segment_bytes))
        run(comm, case, memory)


def run(comm: Communicator, case: Case, memory: Tensor | None) -> None:
    x = place(case, case.given(comm.rank), memory)
    result, bound = case.reduced(comm.size)
    start = sum(case.sizes[: comm.rank])
    mine = slice(start, start + case.sizes[comm.rank])
    if case.collective == "all_reduce":
        comm.all_reduce(x, case.op, case.algorithm)  # type: ignore[arg-type]
        error = (x.double() - result).abs()
    elif case.collective == "reduce_scatter":
        comm.reduce_scatter(x, case.op, case.sizes)  # type: ignore[arg-type]
        error, bound = (x[mine].double() - result[mine]).abs(), bound[mine]
    elif case.collective == "broadcast":
        comm.broadcast(x, case.root)
        error, bound = (x.double() - case.given(case.root)).abs(), bound * 0
    elif case.collective == "all_gather":
        comm.all_gather(x, case.sizes)
        bounds = np.cumsum([0, *case.sizes])
        parts = [case.given(rank)[bounds[rank] : bounds[rank + 1]] for rank in range(comm.size)]
        error, bound = (x.double() - torch.cat(parts)).abs(), bound * 0
    else:
        into = torch.empty(case.sizes[comm.rank] * comm.size, dtype=case.dtype)
        comm.all_to_all(x, into, case.sizes, [case.sizes[comm.rank]] * comm.size)
        parts = [case.given(rank)[mine] for rank in range(comm.size)]
        error, bound = (into.double() - torch.cat(parts)).abs(), torch.zeros(into.numel(), dtype=torch.float64)
    assert bool((error <= bound).all()), str(case)


def place(case: Case, values: Tensor, memory: Tensor | None) -> Tensor:
    """The values where the case wants them: in the arena, in memory of their own, or strided in it."""
    if case.in_arena and memory is not None:
        return memory[: case.size * case.dtype.itemsize].view(case.dtype).copy_(values)
    if case.contiguous:
        return values.to(case.dtype)
    return torch.empty(2 * case.size, dtype=case.dtype)[::2].copy_(values)


@pytest.mark.parametrize("algorithm", ["auto", "ring", "mpi"])
def test_nothing_is_left_of_ten_thousand_calls(comm: Communicator, algorithm: AllReduce) -> None:
    """Memory, descriptors and the entries of what was prepared stay as they were; so do sub-communicators."""
    kept = torch.zeros(100)
    calls: list[Callable[[], object]] = [
        lambda: comm.all_reduce(kept, algorithm=algorithm),
        lambda: comm.all_reduce(torch.zeros(2000), algorithm=algorithm),
        lambda: comm.all_reduce(np.zeros(2000), "max", algorithm),
        lambda: comm.all_gather(torch.zeros(64)),
        lambda: comm.broadcast(np.zeros(300)),
    ]

    def some(count: int) -> tuple[int, int]:
        for i in range(count):
            calls[i % len(calls)]()
        for _ in range(3):
            comm.split("half", comm.rank % 2, comm.rank).free()
        gc.collect()
        return resident_bytes(), len(os.listdir("/proc/self/fd"))

    some(1000)
    memory, descriptors = some(1000)
    later_memory, later_descriptors = some(CALLS)
    assert later_descriptors == descriptors
    assert later_memory - memory < 2 << 20, f"{(later_memory - memory) >> 10} KiB more"
    assert len(comm._operations.prepared) <= 1
    assert not comm.progress._busy


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
