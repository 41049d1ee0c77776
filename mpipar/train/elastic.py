"""Ranks die, and the run goes on without them: who is left, whether they are enough, who leads, what is said of it.

    leave_behind    the living have a mesh of their own
    take_over       as any task it can be attempted again, if somebody dies in it: the first of the living leads

How the living find each other is in comm/failure, the whole in docs/elastic.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mpipar.comm import Communicator, Grid, Mesh, agreement, names, survivors
from mpipar.errors import TooFewRanksError


class Losses:
    """The ranks that a run has lost.

    Args:
        min_ranks: With fewer than this the run ends.
        leads: Whether this rank leads at the beginning: it shows the run, and writes what is kept of it.
    """

    def __init__(self, min_ranks: int, *, leads: bool):
        self._min_ranks = min_ranks
        self._leads = leads
        self._dead: set[int] = set()  # of whom nobody has said yet that they died
        self._news = ""

    def leave_behind(self, mesh: Mesh, move_to: Callable[[Communicator], None], *, step: int) -> Mesh:
        """Collective between the living: the mesh of those who are left.

        Args:
            mesh: With the dead.
            move_to: Collective: goes on with a dp axis without them.
            step: In which they died, for people.
        """
        began = time.perf_counter()
        before = mesh.world.roster.origins

        def build(world: Communicator) -> Mesh:
            smaller = Mesh(world, Grid.of(world.size))
            move_to(smaller["dp"])
            return smaller

        smaller = survivors(mesh.world, build)
        comm = smaller["dp"]
        self._dead |= set(before) - set(comm.roster.origins)
        took_s = time.perf_counter() - began
        self._news = f"{names(sorted(self._dead))} died in step {step}: {comm.size} go on, after {took_s:.2f} s"
        return smaller

    def take_over(self, comm: Communicator, lead: Callable[[], None]) -> None:
        """Collective: the first of those who are left leads.

        Args:
            comm: Their dp axis.
            lead: What this rank does if it is to lead from now on.

        Raises:
            TooFewRanksError: They are not enough. On one rank; on the others a PeerError.
        """
        with agreement(comm):
            if comm.size < self._min_ranks:
                raise TooFewRanksError(
                    f"{self._news}; but --elastic.min-ranks is {self._min_ranks}. The same command goes on from the "
                    "last checkpoint"
                )
            if comm.rank == 0 and not self._leads:
                lead()
                self._leads = True

    def tell(self) -> str:
        """Who has died since the last call, and how many go on."""
        self._dead.clear()
        return self._news
