"""Which ranks share a host, and which algorithm a size gets, without MPI."""

from __future__ import annotations

from typing import get_args

import pytest

from mpipar.comm import wishes as wishes_module
from mpipar.comm.call import KINDS, Call
from mpipar.comm.select import TABLE, VARIABLE, AllReduce, select
from mpipar.comm.topology import Topology
from mpipar.errors import ConfigError


def test_ranks_that_alternate_between_hosts() -> None:
    topology = Topology.of([0, 1, 0, 1, 0])
    assert topology.hosts == ((0, 2, 4), (1, 3))
    assert topology.by_host == (0, 2, 4, 1, 3)
    assert topology.num_hosts == 2
    assert topology.num_rings == 2
    assert [topology.ring(j) for j in range(2)] == [(0, 1), (2, 3)]
    assert topology.neighbours(3) == (1, 3)


def test_a_thousand_ranks() -> None:
    topology = Topology.of([rank - rank % 8 for rank in range(1024)])
    assert topology.num_hosts == 128 and topology.num_rings == 8
    assert sorted(rank for j in range(8) for rank in topology.ring(j)) == list(range(1024))


def test_a_call_is_two_words_and_back() -> None:
    for kind in KINDS:
        call = Call(kind, "bfloat16", 2**40 + 3, 7)
        assert call.word < 2**64
        assert Call.of_words(call.word, 7) == call


def test_every_row_of_the_table_is_reached() -> None:
    reached = set()
    for hosts in (1, 2):
        for in_arena in (False, True):
            for num_bytes in (1, 1 << 20, 1 << 30):
                for usable in ({"ring"}, {"ring", "mpi"}, {"ring", "mpi", "shared"}, {"ring", "mpi", "hierarchical"}):
                    chosen = select("auto", usable, num_hosts=hosts, in_arena=in_arena, num_bytes=num_bytes)  # type: ignore[arg-type]
                    assert chosen in usable
                    reached.add(chosen)
    assert reached == {case.algorithm for case in TABLE}


def test_what_is_asked_for_is_taken_where_it_can_be() -> None:
    assert select("mpi", {"ring", "mpi"}, num_hosts=1, in_arena=False, num_bytes=1 << 30) == "mpi"
    assert select("hierarchical", {"ring"}, num_hosts=1, in_arena=False, num_bytes=1) == "ring"


def test_what_the_ranks_ask_for_must_be_one_algorithm() -> None:
    def agreed(wishes: list[str]) -> str:
        return wishes_module.agreed(VARIABLE, get_args(AllReduce), wishes)

    assert agreed(["auto", "auto"]) == "auto"
    with pytest.raises(ConfigError, match=r"MPIPAR_ALLREDUCE=tree: must be one of auto, ring, shared, .*, mpi"):
        agreed(["tree", "tree"])
    with pytest.raises(ConfigError, match=r"is ring on rank 0 and auto on rank 1: give it to all"):
        agreed(["ring", "auto"])
