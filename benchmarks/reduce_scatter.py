"""Question: how fast does each rank get its chunk of the sum over all ranks?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from benchmarks import gloo, mpi_peer, patterns
from benchmarks.case import Case, Contestant
from benchmarks.limits import Copy, Place
from benchmarks.sweep import Sweep
from mpipar.comm.mpi import MPI


class ReduceScatter(Sweep):
    """Times the reduce-scatter (sum) of mpipar, MPI and gloo, in turn, over a range of sizes.

    Contestants: arena (in shared memory, in place), private (in ordinary memory), mpi, gloo. A size is that of the
    whole array.
    """

    question = "reduce_scatter"
    osu_name = "Reduce_scatter"
    redop = "sum"

    def contestants(self, case: Case) -> Mapping[str, Contestant | str]:
        x, chunk = case.private(), case.private(case.elements // case.world.size)
        scatter = gloo.renamed("reduce_scatter_single", "reduce_scatter_tensor")
        return {
            "arena": case.shared if isinstance(case.shared, str) else _ours(case, case.shared[0], "in the arena"),
            "private": _ours(case, x, "in ordinary memory"),
            "mpi": _mpi(case, x, chunk),
            "gloo": Contestant(
                title=gloo.TITLE, source=x, result=chunk, calls={"reduce_scatter": lambda: scatter(chunk, x)}
            ),
        }

    def given(self, case: Case) -> Tensor:
        return patterns.summand(case.world.rank, case.elements, case.dtype)

    def wanted(self, case: Case) -> Tensor:
        return patterns.total(case.world.size, case.elements, case.dtype)[case.chunk]

    def bus_factor(self, num_ranks: int) -> float:
        return (num_ranks - 1) / num_ranks

    def count(self, elements: int, num_ranks: int) -> int:
        return elements // num_ranks

    def copies(self, num_ranks: int, rank: int, num_bytes: int) -> list[Copy]:
        # Every rank reads its chunk in all segments, and writes it in its own.
        chunk = num_bytes // num_ranks
        own = Place(rank, rank * chunk)
        return [Copy(Place(r, rank * chunk), own, chunk) for r in range(num_ranks) if r != rank]

    def bytes_leaving(self, host_of: Sequence[int], num_bytes: int) -> float:
        num_hosts = len(set(host_of))
        return (num_hosts - 1) / num_hosts * num_bytes


def _ours(case: Case, x: Tensor, where: str) -> Contestant:
    return Contestant(
        title=f"mpipar, {where}",
        source=x,
        result=x[case.chunk],
        calls={"reduce_scatter": lambda: case.world.reduce_scatter(x)},
        ours=True,
    )


def _mpi(case: Case, x: Tensor, chunk: Tensor) -> Contestant | str:
    comm = MPI.COMM_WORLD
    whole, part = mpi_peer.reducible(x), mpi_peer.reducible(chunk)
    if whole is None or part is None:
        return mpi_peer.cannot_add(case.dtype)
    return Contestant(
        title=mpi_peer.title("Reduce_scatter_block"),
        source=x,
        result=chunk,
        calls={
            "Reduce_scatter_block": lambda: comm.Reduce_scatter_block(whole, part),
            "Ireduce_scatter_block": lambda: comm.Ireduce_scatter_block(whole, part).Wait(),
            "Reduce_scatter": lambda: comm.Reduce_scatter(whole, part),
        },
    )
