"""Which ranks share a host. Arithmetic only, so that a cluster can be examined on a laptop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Topology:
    """The ranks of a communicator, by host.

    Args:
        hosts: The ranks on each host, ascending; hosts in the order of their first rank.
    """

    hosts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, hosts: Sequence[int]) -> Topology:
        """From a number for each rank's host: `hosts[r]` is that of rank r."""
        return cls(tuple(tuple(rank for rank, its in enumerate(hosts) if its == host) for host in dict.fromkeys(hosts)))

    @property
    def num_hosts(self) -> int:
        return len(self.hosts)

    @cached_property
    def by_host(self) -> tuple[int, ...]:
        """All ranks, host after host: the order of a ring that enters and leaves each host once."""
        return tuple(rank for host in self.hosts for rank in host)

    @cached_property
    def num_rings(self) -> int:
        """How many rings can pass through every host with a rank of their own on each: the fewest ranks of a host."""
        return min(len(host) for host in self.hosts)

    def ring(self, index: int) -> tuple[int, ...]:
        """The ranks of one of these rings, one on each host."""
        return tuple(host[index] for host in self.hosts)

    def neighbours(self, rank: int) -> tuple[int, ...]:
        """The ranks on the host of `rank`, itself among them."""
        return next(host for host in self.hosts if rank in host)
