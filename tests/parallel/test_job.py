"""Ranks that cannot go on agree on it, and one of them says why."""

from __future__ import annotations

import pickle

import pytest

from mpipar.comm import Communicator, Grid, Mesh, agreement, decide_on_root
from mpipar.errors import ConfigError, DataError, MpiparError, PeerError


def test_all_well(comm: Communicator) -> None:
    with agreement(comm):
        reached = comm.rank
    assert reached == comm.rank


@pytest.mark.parametrize("failing", ["first", "last", "all"])
def test_the_lowest_failing_rank_keeps_its_error(comm: Communicator, failing: str) -> None:
    fails = {"first": [0], "last": [comm.size - 1], "all": list(range(comm.size))}[failing]
    with pytest.raises(MpiparError) as raised, agreement(comm):
        if comm.rank in fails:
            raise DataError(f"shard {comm.rank}")
    if comm.rank == fails[0]:
        assert isinstance(raised.value, DataError) and raised.value.message == f"shard {comm.rank}"
    else:
        assert isinstance(raised.value, PeerError) and raised.value.rank == fails[0]


def test_an_error_that_is_no_error_of_the_input_is_not_held_back(comm: Communicator) -> None:
    """All ranks have the same bug here; none waits for a verdict of the others."""
    with pytest.raises(ZeroDivisionError), agreement(comm):
        raise ZeroDivisionError


def test_what_rank_0_decides_is_everybodys(comm: Communicator) -> None:
    assert decide_on_root(comm, lambda: ("decided on", comm.rank)) == ("decided on", 0)


def test_an_exit_on_rank_0_is_everybodys(comm: Communicator) -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit) as raised:
        decide_on_root(comm, leave)
    assert raised.value.code == 3


def test_an_error_on_rank_0_is_everybodys(comm: Communicator) -> None:
    def fail() -> None:
        raise ConfigError("--train.steps")

    with pytest.raises(ConfigError if comm.rank == 0 else PeerError) as raised:
        decide_on_root(comm, fail)
    assert raised.value.exit_code == 2, "mpirun gives the code of any rank"


def test_errors_travel_between_ranks(comm: Communicator) -> None:
    error = DataError("a shard", rank=3, step=7)
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == "a shard (rank 3, step 7)" and (back.rank, back.axis, back.step) == (3, None, 7)


def test_a_mesh_has_a_communicator_for_each_axis(comm: Communicator) -> None:
    mesh = Mesh(comm, Grid.of(comm.size))
    assert mesh["dp"].size == comm.size and mesh["dp"].rank == comm.rank == mesh.coordinates["dp"]
    assert mesh["tp"].size == mesh["pp"].size == mesh["cp"].size == 1
    assert mesh.num_hosts == 1 and mesh.host.size == comm.size
    assert mesh.cores_per_rank >= 1
    if comm.size == 4:
        square = Mesh(comm, Grid.of(4, tp=2))
        assert square["dp"].all_gather_object(comm.rank) == [comm.rank % 2, comm.rank % 2 + 2]
        assert square["tp"].all_gather_object(comm.rank) == [comm.rank // 2 * 2, comm.rank // 2 * 2 + 1]
