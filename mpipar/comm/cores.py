"""The cores of a host, shared out between its ranks."""

from __future__ import annotations

from mpipar.comm.communicator import Communicator
from mpipar.comm.environment import usable_cores


def cores_per_rank(host: Communicator) -> int:
    """Collective: how many cores a rank may use for its threads.

    A launcher may have bound the ranks to cores of their own, or let all of them have all cores.

    Args:
        host: The ranks of one host.
    """
    mine = usable_cores()
    shared = set().union(*host.all_gather_object(mine))
    return max(1, min(len(mine), len(shared) // host.size))
