"""Microbatches are claimed: between processes too each is computed once, and a slow rank takes fewer."""

from __future__ import annotations

import time

import pytest

from mpipar.comm import Communicator
from mpipar.comm.counter import Counter
from mpipar.train.dealing import Dealing, Team, open_counter

COUNT = 24


def test_a_slow_rank_takes_fewer(comm: Communicator) -> None:
    if comm.size == 1 or comm.topology.num_hosts > 1:
        pytest.skip("for several ranks of one host")
    counter = open_counter(comm)
    assert isinstance(counter, Counter), counter
    dealing = Dealing(Team.of(comm, comm.size), COUNT, counter)
    slow = comm.size - 1
    for _ in range(3):
        taken = []
        comm.barrier()
        for index in dealing.begin():
            time.sleep(0.05 if comm.rank == slow else 0.002)
            taken.append(index)
        everybodys = comm.all_gather_object(taken)
        assert sorted(index for indices in everybodys for index in indices) == list(range(COUNT))
        assert len(everybodys[slow]) < COUNT / comm.size


def test_a_spare_takes_none_until_somebody_dies(comm: Communicator) -> None:
    if comm.size == 1 or comm.topology.num_hosts > 1:
        pytest.skip("for several ranks of one host")
    counter = open_counter(comm)
    assert isinstance(counter, Counter), counter
    workers = comm.size - 1
    dealing = Dealing(Team.of(comm, workers), COUNT, counter)
    taken = comm.all_gather_object(list(dealing.begin()))
    assert sorted(index for indices in taken for index in indices) == list(range(COUNT))
    assert taken[workers] == []
    comm.barrier()
    rest = comm.split("rest", color=int(comm.rank == 0), key=comm.rank)  # as if rank 0 had died
    if comm.rank > 0:
        dealing.move_to(Team.of(rest, workers))
        taken = rest.all_gather_object(list(dealing.begin()))
        assert sorted(index for indices in taken for index in indices) == list(range(COUNT))
