"""Which all-reduce for which array: one table, measured.

`python -m benchmarks allreduce` prints the times of all of them beside each other; `docs/select.md` has those that the
table was made from. For experiments, MPIPAR_ALLREDUCE=ring|shared|hierarchical|mpi takes one algorithm wherever it can
be used; auto is the table.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

AllReduce = Literal["auto", "ring", "shared", "hierarchical", "mpi"]

VARIABLE = "MPIPAR_ALLREDUCE"


class Case(NamedTuple):
    """A row of the table.

    Args:
        hosts: That the ranks are on.
        in_arena: Whether the array lies in memory that the ranks of a host share.
        largest_bytes: Up to which size of the array the row is meant.
        algorithm: What to use.
        in_one_call: Whether it holds only for sums that one compiled call makes.
    """

    hosts: Literal["one", "several"]
    in_arena: bool
    largest_bytes: float
    algorithm: AllReduce
    in_one_call: bool = False


# The first row that fits, of those whose algorithm can be used.
TABLE = (
    Case("one", True, math.inf, "shared"),
    Case("one", False, 1 << 20, "shared"),
    Case("one", False, math.inf, "shared", in_one_call=True),
    Case("one", False, 256 << 10, "mpi"),
    Case("one", False, math.inf, "ring"),
    Case("several", True, 32 << 10, "mpi"),
    Case("several", True, math.inf, "hierarchical"),
    Case("several", False, 32 << 10, "mpi"),
    Case("several", False, math.inf, "ring"),
)


def select(
    asked: AllReduce, usable: set[AllReduce], *, num_hosts: int, in_arena: bool, in_one_call: bool, num_bytes: int
) -> AllReduce:
    """The algorithm for one array.

    Args:
        asked: What the caller, or the user, wants; it is taken if it can be used.
        usable: What can be used for this array; the ring always can.
        num_hosts: That the ranks are on.
        in_arena: Whether the array lies in memory that the ranks of a host share.
        in_one_call: Whether one compiled call adds up arrays like it, on one host.
        num_bytes: Its size.
    """
    if asked in usable:
        return asked
    hosts = "one" if num_hosts == 1 else "several"
    for case in TABLE:
        fits = case.hosts == hosts and case.in_arena == in_arena and num_bytes <= case.largest_bytes
        if fits and case.algorithm in usable and (in_one_call or not case.in_one_call):
            return case.algorithm
    return "ring"
