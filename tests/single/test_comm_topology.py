"""Which ranks share a host, and which algorithm a size gets, without MPI."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from mpipar.comm import wishes as wishes_module
from mpipar.comm.call import KINDS, Call
from mpipar.comm.roster import Roster
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
    sets_of_usable: list[set[AllReduce]] = [
        {"ring"},
        {"ring", "mpi"},
        {"ring", "mpi", "shared"},
        {"ring", "mpi", "hierarchical"},
    ]
    reached = set()
    for hosts, in_arena, in_one_call in product((1, 2), (False, True), (False, True)):
        for num_bytes, usable in product((1, 1 << 20, 1 << 30), sets_of_usable):
            chosen = select(
                "auto", usable, num_hosts=hosts, in_arena=in_arena, in_one_call=in_one_call, num_bytes=num_bytes
            )
            assert chosen in usable
            reached.add(chosen)
    assert reached == {case.algorithm for case in TABLE}


def test_ordinary_memory_goes_through_slots_as_far_as_one_call_does_it() -> None:
    def chosen(num_bytes: int, *, in_one_call: bool) -> AllReduce:
        usable: set[AllReduce] = {"ring", "shared", "mpi"}
        return select("auto", usable, num_hosts=1, in_arena=False, in_one_call=in_one_call, num_bytes=num_bytes)

    assert chosen(1 << 30, in_one_call=True) == "shared"
    assert chosen(1 << 30, in_one_call=False) == "ring"
    assert chosen(1 << 20, in_one_call=False) == "shared"


def test_a_host_is_crowded_if_its_ranks_are_more_than_their_cores() -> None:
    def roster(*cores: set[int]) -> Roster:
        n = len(cores)
        return Roster(tuple(range(n)), (0,) * n, "auto", "auto", (True,) * n, tuple(map(frozenset, cores)))

    assert not roster({0}, {1}).is_crowded([0, 1])  # bound by the launcher
    assert not roster({0, 1}, {0, 1}).is_crowded([0, 1])
    assert roster({0}, {0}).is_crowded([0, 1])
    assert roster({0, 1}, {0, 1}, {0, 1}).is_crowded([0, 1, 2])
    of_two = roster({0}, {0}, {1}).among([0, 2])
    assert of_two.cores == (frozenset({0}), frozenset({1})) and not of_two.is_crowded([0, 1])


def test_what_is_asked_for_is_taken_where_it_can_be() -> None:
    assert select("mpi", {"ring", "mpi"}, num_hosts=1, in_arena=False, in_one_call=False, num_bytes=1 << 30) == "mpi"
    assert select("hierarchical", {"ring"}, num_hosts=1, in_arena=False, in_one_call=False, num_bytes=1) == "ring"


def test_what_the_ranks_ask_for_must_be_one_algorithm() -> None:
    def agreed(wishes: list[str]) -> str:
        return wishes_module.agreed(VARIABLE, get_args(AllReduce), wishes)

    assert agreed(["auto", "auto"]) == "auto"
    with pytest.raises(ConfigError, match=r"MPIPAR_ALLREDUCE=tree: must be one of auto, ring, shared, .*, mpi"):
        agreed(["tree", "tree"])
    with pytest.raises(ConfigError, match=r"is ring on rank 0 and auto on rank 1: give it to all"):
        agreed(["ring", "auto"])
