"""Question: how fast does every rank get the chunks of all?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from benchmarks import gloo, mpi_peer, patterns
from benchmarks.case import Case, Contestant
from benchmarks.limits import Copy, Place
from benchmarks.sweep import Sweep
from mpipar.comm.mpi import MPI


class AllGather(Sweep):
    """Times the all-gather of mpipar, MPI and gloo, in turn, over a range of sizes.

    Contestants: arena (in shared memory, in place), private (in ordinary memory), mpi, gloo. A size is that of the
    whole array.
    """

    question = "all_gather"
    osu_name = "Allgather"
    redop = "none"

    def contestants(self, case: Case) -> Mapping[str, Contestant | str]:
        x, chunk = case.private(), case.private(case.elements // case.world.size)
        gather = gloo.renamed("all_gather_single", "all_gather_into_tensor")
        comm, whole, part = MPI.COMM_WORLD, mpi_peer.movable(x), mpi_peer.movable(chunk)
        return {
            "arena": case.shared if isinstance(case.shared, str) else _ours(case, case.shared[0], "in the arena"),
            "private": _ours(case, x, "in ordinary memory"),
            "mpi": Contestant(
                title=mpi_peer.title("Allgather"),
                source=chunk,
                result=x,
                calls={
                    "Allgather": lambda: comm.Allgather(part, whole),
                    "Iallgather": lambda: comm.Iallgather(part, whole).Wait(),
                },
            ),
            "gloo": Contestant(
                title=gloo.TITLE, source=chunk, result=x, calls={"all_gather": lambda: gather(x, chunk)}
            ),
        }

    def given(self, case: Case) -> Tensor:
        return self.wanted(case)[case.chunk]

    def wanted(self, case: Case) -> Tensor:
        return patterns.numbers(case.elements, case.dtype)

    def bus_factor(self, num_ranks: int) -> float:
        return (num_ranks - 1) / num_ranks

    def count(self, elements: int, num_ranks: int) -> int:
        return elements // num_ranks

    def copies(self, num_ranks: int, rank: int, num_bytes: int) -> list[Copy]:
        # Every rank reads its chunk, and writes it in all other segments.
        chunk = num_bytes // num_ranks
        own = Place(rank, rank * chunk)
        return [Copy(own, Place(r, rank * chunk), chunk) for r in range(num_ranks) if r != rank]

    def bytes_leaving(self, host_of: Sequence[int], num_bytes: int) -> float:
        num_hosts = len(set(host_of))
        return (num_hosts - 1) / num_hosts * num_bytes


def _ours(case: Case, x: Tensor, where: str) -> Contestant:
    return Contestant(
        title=f"mpipar, {where}",
        source=x[case.chunk],
        result=x,
        calls={"all_gather": lambda: case.world.all_gather(x)},
        ours=True,
    )
