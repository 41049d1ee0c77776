"""Questions: how fast does each rank get its chunk of the sum over all, and how fast every rank the chunks of all?

They are the halves of an all-reduce, between whole arrays and the chunk of them that belongs to a rank. What goes one
way in the first goes the other way in the second.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from benchmarks import gloo, mpi_peer, patterns
from benchmarks.case import Case, Contestant
from benchmarks.limits import Copy, Place
from benchmarks.mpi_peer import Calls, Message
from benchmarks.sweep import Sweep
from mpipar.comm import Communicator
from mpipar.comm.mpi import MPI

End = TypeVar("End")


class Half(Sweep):
    """What both share. A size is that of the whole array."""

    @abstractmethod
    def ends(self, whole: End, chunk: End) -> tuple[End, End]:
        """(where it comes from, where it goes)."""

    @abstractmethod
    def ours(self, case: Case, whole: Tensor) -> Callable[[], object]:
        """By mpipar, in place."""

    @abstractmethod
    def calls_of_mpi(self, world: Communicator, source: Message, result: Message) -> Calls:
        """By MPI."""

    @abstractmethod
    def of_gloo(self) -> Callable[[Tensor, Tensor], object]:
        """By torch.distributed: what takes the result and the source."""

    def contestants(self, case: Case) -> Mapping[str, Contestant | str]:
        whole, chunk = case.private(), case.private(case.elements // case.world.size)
        return {
            "arena": case.shared if isinstance(case.shared, str) else self._ours(case, case.shared[0], "in the arena"),
            "private": self._ours(case, whole, "in ordinary memory"),
            "mpi": self._mpi(case, *self.ends(whole, chunk)),
            "gloo": self._gloo(*self.ends(whole, chunk)),
        }

    def copies(self, num_ranks: int, rank: int, num_bytes: int) -> list[Copy]:
        # Between a rank's chunk and the same elements in the arrays of all others.
        chunk = num_bytes // num_ranks
        start = rank * chunk
        own, others = Place(rank, start), [Place(r, start) for r in range(num_ranks) if r != rank]
        return [Copy(*self.ends(other, own), chunk) for other in others]

    def bytes_leaving(self, host_of: Sequence[int], num_bytes: int) -> float:
        num_hosts = len(set(host_of))
        return (num_hosts - 1) / num_hosts * num_bytes

    def _ours(self, case: Case, whole: Tensor, where: str) -> Contestant:
        source, result = self.ends(whole, whole[case.chunk])
        calls = {self.question: self.ours(case, whole)}
        return Contestant(title=f"mpipar, {where}", source=source, result=result, calls=calls, ours=True)

    def _mpi(self, case: Case, source: Tensor, result: Tensor) -> Contestant | str:
        as_message = mpi_peer.movable if self.redop == "none" else mpi_peer.reducible
        given, taken = as_message(source), as_message(result)
        if given is None or taken is None:
            return mpi_peer.cannot_add(case.dtype)
        calls = self.calls_of_mpi(case.world, given, taken)
        return Contestant(title=mpi_peer.title(next(iter(calls))), source=source, result=result, calls=calls)

    def _gloo(self, source: Tensor, result: Tensor) -> Contestant:
        run = self.of_gloo()
        calls = {self.question: lambda: run(result, source)}
        return Contestant(title=gloo.TITLE, source=source, result=result, calls=calls)


class ReduceScatter(Half):
    """Times the reduce-scatter (sum) of mpipar, MPI and gloo, in turn, over a range of sizes.

    Contestants: arena (in shared memory, in place), private (in ordinary memory), mpi, gloo. A size is that of the
    whole array.
    """

    question = "reduce_scatter"
    osu_name = "Reduce_scatter"
    redop = "sum"

    def ends(self, whole: End, chunk: End) -> tuple[End, End]:
        return whole, chunk

    def given(self, case: Case) -> Tensor:
        return patterns.summand(case.world.rank, case.elements, case.dtype)

    def wanted(self, case: Case) -> Tensor:
        return patterns.total(case.world.size, case.elements, case.dtype)[case.chunk]

    def ours(self, case: Case, whole: Tensor) -> Callable[[], object]:
        return lambda: case.world.reduce_scatter(whole)

    def calls_of_mpi(self, world: Communicator, source: Message, result: Message) -> Calls:
        return {
            **mpi_peer.calls(world, "Reduce_scatter_block", source, result),
            **mpi_peer.blocking(world, {"Reduce_scatter": lambda: MPI.COMM_WORLD.Reduce_scatter(source, result)}),
        }

    def of_gloo(self) -> Callable[[Tensor, Tensor], object]:
        return gloo.renamed("reduce_scatter_single", "reduce_scatter_tensor")


class AllGather(Half):
    """Times the all-gather of mpipar, MPI and gloo, in turn, over a range of sizes.

    Contestants: arena (in shared memory, in place), private (in ordinary memory), mpi, gloo. A size is that of the
    whole array.
    """

    question = "all_gather"
    osu_name = "Allgather"
    redop = "none"

    def ends(self, whole: End, chunk: End) -> tuple[End, End]:
        return chunk, whole

    def given(self, case: Case) -> Tensor:
        return self.wanted(case)[case.chunk]

    def wanted(self, case: Case) -> Tensor:
        return patterns.numbers(case.elements, case.dtype)

    def ours(self, case: Case, whole: Tensor) -> Callable[[], object]:
        return lambda: case.world.all_gather(whole)

    def calls_of_mpi(self, world: Communicator, source: Message, result: Message) -> Calls:
        return mpi_peer.calls(world, "Allgather", source, result)

    def of_gloo(self) -> Callable[[Tensor, Tensor], object]:
        return gloo.renamed("all_gather_single", "all_gather_into_tensor")
