"""Who computes: the ranks that are alive, but for the spares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpipar.comm import Communicator


@dataclass(frozen=True)
class Team:
    """The ranks of the dp axis as one of them sees them.

    Args:
        rank: This one.
        size: How many there are.
        workers: The first so many compute. The others are spares: they reduce and update with the rest, so that they
            can step in.
    """

    rank: int
    size: int
    workers: int

    @classmethod
    def of(cls, comm: Communicator, workers: int) -> Team:
        """The team of which at most so many compute."""
        return cls(comm.rank, comm.size, min(workers, comm.size))

    def share(self, count: int) -> Sequence[int]:
        """Which of `count` things are this rank's."""
        return range(self.rank, count, self.workers) if self.rank < self.workers else range(0)
