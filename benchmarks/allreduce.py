"""Question: how fast does an array become the sum over all ranks?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from benchmarks import gloo, mpi_peer, patterns
from benchmarks.case import Case, Contestant
from benchmarks.limits import Copy, Place
from benchmarks.sweep import Sweep
from mpipar.comm.mpi import MPI
from mpipar.comm.select import AllReduce as Algorithm


class AllReduce(Sweep):
    """Times the all-reduce (sum) of mpipar, MPI and gloo, in turn, over a range of sizes.

    Contestants: arena (in shared memory, in place), exact (there, doubles that do not round, as reproducible training
    adds them up), hierarchical (the arena's counterpart between hosts), private (in ordinary memory, by whatever mpipar
    chooses), ring, native (mpipar through MPI's), mpi, gloo.
    """

    num_doubles = 1

    question = "allreduce"
    osu_name = "Allreduce"
    redop = "sum"

    def contestants(self, case: Case) -> Mapping[str, Contestant | str]:
        x, on_one_host = case.private(), case.mesh.num_hosts == 1
        return {
            "arena": _in_arena(case, "auto", "in the arena") if on_one_host else "there are several hosts",
            "exact": _exact(case),
            "hierarchical": (
                "there is one host"
                if on_one_host
                else _in_arena(case, "hierarchical", "first on each host, then between them")
            ),
            "private": _ours(case, x, "auto", "in ordinary memory"),
            "ring": _ours(case, x, "ring", "ring"),
            "native": (
                _ours(case, x, "mpi", "through MPI_Iallreduce")
                if mpi_peer.reducible(x)
                else mpi_peer.cannot_add(case.dtype)
            ),
            "mpi": _mpi(case, x),
            "gloo": Contestant(title=gloo.TITLE, source=x, result=x, calls={"all_reduce": lambda: dist.all_reduce(x)}),
        }

    def given(self, case: Case) -> Tensor:
        return patterns.summand(case.world.rank, case.elements, case.dtype)

    def wanted(self, case: Case) -> Tensor:
        return patterns.total(case.world.size, case.elements, case.dtype)

    def bus_factor(self, num_ranks: int) -> float:
        return 2 * (num_ranks - 1) / num_ranks

    def count(self, elements: int, num_ranks: int) -> int:
        return elements

    def copies(self, num_ranks: int, rank: int, num_bytes: int) -> list[Copy]:
        # Every rank reads its chunk in all segments, and writes it in all; each is read before it is written, which is
        # faster than to write what only another core has in its cache.
        chunk = num_bytes // num_ranks
        start = rank * chunk
        ring = [(rank + i) % num_ranks for i in range(num_ranks + 1)]
        return [Copy(Place(source, start), Place(target, start), chunk) for target, source in pairwise(ring)]

    def bytes_leaving(self, host_of: Sequence[int], num_bytes: int) -> float:
        num_hosts = len(set(host_of))
        return 2 * (num_hosts - 1) / num_hosts * num_bytes


def _ours(case: Case, x: Tensor, algorithm: Algorithm, where: str) -> Contestant:
    return Contestant(
        title=f"mpipar, {where}",
        source=x,
        result=x,
        calls={f"all_reduce({algorithm})": lambda: case.world.all_reduce(x, algorithm=algorithm)},
        ours=True,
    )


def _in_arena(case: Case, algorithm: Algorithm, where: str) -> Contestant | str:
    return case.shared if isinstance(case.shared, str) else _ours(case, case.shared[0], algorithm, where)


def _exact(case: Case) -> Contestant | str:
    if isinstance(case.shared, str):
        return case.shared
    into, x = case.shared[0], case.doubles[0]
    return Contestant(
        title="mpipar, exactly",
        source=x,
        result=into,
        calls={"all_reduce_into": lambda: case.world.start_all_reduce_into(into, x).wait()},
        ours=True,
    )


def _mpi(case: Case, x: Tensor) -> Contestant | str:
    comm = MPI.COMM_WORLD
    chunk = case.private(case.elements // case.world.size)
    whole, part = mpi_peer.reducible(x), mpi_peer.reducible(chunk)
    if whole is None or part is None:
        return mpi_peer.cannot_add(case.dtype)

    def in_halves() -> None:
        comm.Reduce_scatter_block(whole, part)
        comm.Allgather(part, whole)

    return Contestant(
        title=mpi_peer.title("Allreduce"),
        source=x,
        result=x,
        calls={
            **mpi_peer.calls(case.world, "Allreduce", MPI.IN_PLACE, whole),
            **mpi_peer.blocking(case.world, {"Reduce_scatter_block+Allgather": in_halves}),
        },
    )
