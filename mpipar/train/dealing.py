"""Who computes which microbatch. The result does not depend on it; the time that a step takes does.

Of the ranks that are alive all but the spares compute. Statically, worker r of n takes r, r + n, r + 2n, ... On claim,
each host has a share of the step in proportion to how fast it was; a worker begins with the one at its place in the
share, and takes the next from a counter on its host, one ahead of what it computes: a slow rank takes fewer.

    host A, fast    0 1 2 3 4     rank 0: 0, 2, 4     rank 1: 1, 3
    host B, slow    5 6           rank 2: 5           rank 3: 6
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpipar.comm import Communicator
from mpipar.comm.counter import Counter

_MEMORY = 0.5  # what the steps before count for in a host's speed


@dataclass(frozen=True)
class Team:
    """The ranks of the dp axis as one of them sees them.

    Args:
        rank: This one.
        hosts: All ranks by host.
        workers: The first so many compute. The others are spares: they reduce and update with the rest, so that they
            can step in.
    """

    rank: int
    hosts: tuple[tuple[int, ...], ...]
    workers: int

    @classmethod
    def of(cls, comm: Communicator, workers: int) -> Team:
        """The team of which at most so many compute."""
        return cls(comm.rank, comm.topology.hosts, min(workers, comm.size))

    @property
    def works(self) -> bool:
        """Whether this rank computes."""
        return self.rank < self.workers

    @property
    def host(self) -> int:
        """The number of this rank's host."""
        return next(number for number, ranks in enumerate(self.hosts) if self.rank in ranks)

    def workers_of(self, host: int) -> list[int]:
        """The ranks of a host that compute."""
        return [rank for rank in self.hosts[host] if rank < self.workers]

    def share(self, count: int) -> Sequence[int]:
        """Which of `count` things are this rank's."""
        return range(self.rank, count, self.workers) if self.works else range(0)


class Dealing:
    """Deals the microbatches of each step.

    Args:
        team: Who computes.
        count: Microbatches in a step.
        counter: Of this host, to claim from; None to deal statically.
    """

    def __init__(self, team: Team, count: int, counter: Counter | None):
        self._count = count
        self._counter = counter
        self._epoch = 0
        self.move_to(team)

    def move_to(self, team: Team) -> None:
        """Another team computes from now on."""
        self.team = team
        self._measured = False
        self._speeds = [float(len(team.workers_of(host))) for host in range(len(team.hosts))]

    @property
    def first(self) -> Sequence[int]:
        """What this rank begins the next step with, as far as can be known."""
        if self._counter is None:
            return self.team.share(self._count)
        return self._share()[self._place() :][:1] if self.team.works else []

    def begin(self) -> Iterator[int]:
        """This rank's microbatches of a step, or of another attempt at it. All ranks of the team call it alike."""
        self._epoch += 1
        if self._counter is None:
            return iter(self.team.share(self._count))
        return self._claimed(self._counter, self._epoch, self._share()) if self.team.works else iter(())

    def learn(self, counts: Sequence[float], seconds: Sequence[float]) -> None:
        """From a step that is done: how many microbatches each rank has computed, and how long it took for them."""
        for host in range(len(self.team.hosts)):
            rates = [counts[rank] / seconds[rank] for rank in self.team.workers_of(host) if counts[rank]]
            if rates:  # of those who had nothing to do nothing is known
                speed = sum(rates) / len(rates) * len(self.team.workers_of(host))
                before = self._speeds[host] if self._measured else speed
                self._speeds[host] = _MEMORY * before + (1 - _MEMORY) * speed
        self._measured = True

    def _claimed(self, counter: Counter, epoch: int, share: Sequence[int]) -> Iterator[int]:
        place, workers = self._place(), len(self.team.workers_of(self.team.host))
        while place < len(share):
            yield share[place]
            place = workers + counter.claim(epoch)

    def _place(self) -> int:
        """This rank's place among the workers of its host."""
        return self.team.workers_of(self.team.host).index(self.team.rank)

    def _share(self) -> Sequence[int]:
        """The microbatches of this rank's host."""
        sizes = apportion(self._count, self._speeds)
        begin = sum(sizes[: self.team.host])
        return range(begin, begin + sizes[self.team.host])


def open_counter(comm: Communicator) -> Counter | str:
    """Collective: a counter for the ranks of each host, or on all ranks why there can be none."""
    descriptor = comm.share_file(Counter.NUM_BYTES)
    return descriptor if isinstance(descriptor, str) else Counter(descriptor)


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """`count` things divided in proportion to the weights: whole numbers, the largest remainders rounded up."""
    exact = [count * weight / sum(weights) for weight in weights]
    sizes = [int(size) for size in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (sizes[i] - exact[i], i))
    for i in by_remainder[: count - sum(sizes)]:
        sizes[i] += 1
    return sizes
