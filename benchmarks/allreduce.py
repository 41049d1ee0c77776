"""Question: how fast are the ring and the arena, beside MPI_Allreduce and torch's gloo?

One table for each, in the form of nccl-tests:

    size, time      bytes of the array on each rank; microseconds, median of the slowest rank
    algbw           size / time
    busbw           algbw * 2 (n - 1) / n: the speed of the link that a ring would need
    #wrong          elements that differ from the exact sum

then tables of ratios. The arena needs all ranks on one host. Inputs are small integers, whose sums are exact in every
dtype here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gloo import stop_gloo
from benchmarks.measure import Times, begin, ratio, take_turns
from mpipar.comm import Communicator, mpi_version
from mpipar.comm.arena import Arena
from mpipar.comm.mpi import MPI
from mpipar.errors import ConfigError

_MPI_TYPES = {"float32": MPI.FLOAT, "float64": MPI.DOUBLE, "int32": MPI.INT32_T, "int64": MPI.INT64_T}


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """Times the all-reduce (sum) of the ring, the arena, MPI and gloo, in turn, over a range of sizes."""

    min_bytes: int = 4096
    """Smallest array."""
    max_bytes: int = 64 << 20
    """Largest array; each is 4 times the one before."""
    dtype: Literal["float32", "float64", "int32", "int64"] = "float32"
    """Of the elements."""
    rounds: int = 15
    """Measurements of each size."""
    warmup: int = 3
    """Measurements of each size that are not kept."""

    def run(self, world: Communicator) -> None:
        """Measures and prints. Collective."""
        if not 8 <= self.min_bytes <= self.max_bytes:
            raise ConfigError(
                f"--min-bytes {self.min_bytes} must be at least 8 and at most --max-bytes {self.max_bytes}"
            )
        if world.size == 1:
            raise ConfigError("one rank has nothing to reduce: mpirun -n 2 python -m benchmarks allreduce")
        begin(world, self.rounds)
        results = {size: self._measure(world, size) for size in self._sizes()}
        stop_gloo(world)
        if world.rank == 0:
            for name in next(iter(results.values()))[0]:
                self._print_table(name, world.size, results)
            for name in ("arena", "ring"):
                _print_ratios(name, results)

    def _sizes(self) -> list[int]:
        sizes, size = [], self.min_bytes
        while size <= self.max_bytes:
            sizes.append(size)
            size *= 4
        return sizes

    def _measure(self, world: Communicator, size: int) -> tuple[Times, dict[str, int]]:
        """(times, elements that were wrong) of each contestant at one size."""
        dtype = getattr(torch, self.dtype)
        x = torch.empty(size // dtype.itemsize, dtype=dtype)
        message = [x.numpy(), _MPI_TYPES[self.dtype]]
        arrays = {"ring": x, "mpi": x, "gloo": x}
        runs: dict[str, Callable[[], object]] = {
            "ring": lambda: world.all_reduce(x),
            "mpi": lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, message),
            "gloo": lambda: dist.all_reduce(x),
        }
        arena = world.open_arena(size)
        if isinstance(arena, Arena):
            arrays["arena"] = shared = arena.allocate(x.numel(), dtype, x.device)
            runs["arena"] = lambda: world.all_reduce(shared)
        wrong = {name: _count_wrong(world, arrays[name], run) for name, run in runs.items()}
        prepare = lambda name: arrays[name].zero_()  # noqa: E731
        times = take_turns(world, runs, rounds=self.rounds, warmup=self.warmup, prepare=prepare)
        if isinstance(arena, Arena):
            world.close_arena(arena)
        return times, wrong

    def _print_table(self, name: str, n: int, results: dict[int, tuple[Times, dict[str, int]]]) -> None:
        print(f"#\n# {_TITLES[name]}")
        print(_HEADING.format("#", "size", "count", "type", "redop", "root", "time", "algbw", "busbw", "#wrong"))
        print(_HEADING.format("#", "(B)", "(elements)", "", "", "", "(us)", "(GB/s)", "(GB/s)", "").rstrip())
        busbws = []
        for size, (times, wrong) in results.items():
            seconds = float(np.median(times[name]))
            algbw = size / seconds / 1e9
            busbws.append(algbw * 2 * (n - 1) / n)
            print(
                f"  {size:>10} {size // np.dtype(self.dtype).itemsize:>12} {self.dtype:>8} {'sum':>6} {-1:>5} "
                f"{seconds * 1e6:>9.1f} {algbw:>7.2f} {busbws[-1]:>7.2f} {wrong[name]:>6}"
            )
        print(f"# Avg bus bandwidth    : {np.mean(busbws):.3f}", flush=True)


_HEADING = "{} {:>10} {:>12} {:>8} {:>6} {:>5} {:>9} {:>7} {:>7} {:>6}"
_TITLES = {
    "arena": "mpipar in the arena",
    "ring": "mpipar ring",
    "mpi": f"MPI_Allreduce, {mpi_version()}",
    "gloo": "torch.distributed gloo",
}


def _count_wrong(world: Communicator, x: Tensor, run: Callable[[], object]) -> int:
    """Elements, over all ranks, that are not the exact sum."""
    place = torch.arange(x.numel(), dtype=x.dtype) % 17
    x.copy_(place * (world.rank + 1))
    run()
    wrong = int((x != place * (world.size * (world.size + 1) // 2)).sum())
    return int(world.all_reduce(np.array([wrong]))[0])


def _print_ratios(name: str, results: dict[int, tuple[Times, dict[str, int]]]) -> None:
    print(f"#\n# {_TITLES[name]}: how many times as fast as its peers (median of rounds, quartiles)")
    print(f"# {'size':>10} {'MPI_Allreduce':>22} {'gloo':>22}")
    for size, (times, _) in results.items():
        if name in times:
            cells = ["{:.2f} ({:.2f} .. {:.2f})".format(*ratio(times, peer, name)) for peer in ("mpi", "gloo")]
            print(f"  {size:>10} {cells[0]:>22} {cells[1]:>22}", flush=True)
