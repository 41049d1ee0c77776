"""Question: how fast does every rank get its part from each other rank?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import gloo, mpi_peer, patterns
from benchmarks.case import Case, Contestant
from benchmarks.limits import Copy, Place
from benchmarks.sweep import Sweep


class AllToAll(Sweep):
    """Times the all-to-all of mpipar, MPI and gloo, in turn, over a range of sizes.

    Contestants: mpipar, mpi, gloo. A size is that of the array that a rank gives, which is also that of what it gets.
    """

    question = "all_to_all"
    osu_name = "All-to-All Personalized Exchange"
    redop = "none"
    num_arrays = 2

    def contestants(self, case: Case) -> Mapping[str, Contestant | str]:
        out, into = case.private(), case.private()
        given, taken = mpi_peer.movable(out), mpi_peer.movable(into)
        return {
            "mpipar": Contestant(
                title="mpipar",
                source=out,
                result=into,
                calls={"all_to_all": lambda: case.world.all_to_all(out, into)},
                ours=True,
            ),
            "mpi": Contestant(
                title=mpi_peer.title("Alltoall"),
                source=out,
                result=into,
                calls=mpi_peer.calls(case.world, "Alltoall", given, taken),
            ),
            "gloo": Contestant(
                title=gloo.TITLE,
                source=out,
                result=into,
                calls={"all_to_all_single": lambda: dist.all_to_all_single(into, out)},
            ),
        }

    def given(self, case: Case) -> Tensor:
        return torch.cat([_part(case, case.world.rank, to) for to in range(case.world.size)])

    def wanted(self, case: Case) -> Tensor:
        return torch.cat([_part(case, source, case.world.rank) for source in range(case.world.size)])

    def copies(self, num_ranks: int, rank: int, num_bytes: int) -> list[Copy]:
        # Every rank reads its part in what all give, and writes it into what it gets.
        part = num_bytes // num_ranks
        return [Copy(Place(r, rank * part), Place(rank, r * part, array=1), part) for r in range(num_ranks)]

    def bytes_leaving(self, host_of: Sequence[int], num_bytes: int) -> float:
        num_ranks = len(host_of)
        return max(here * (num_ranks - here) for here in map(host_of.count, set(host_of))) * num_bytes / num_ranks


def _part(case: Case, source: int, to: int) -> Tensor:
    """What one rank gives to another."""
    return patterns.numbers(case.elements // case.world.size, case.dtype, start=7 * source + 3 * to)
