"""The arithmetic of meshes, for far more ranks than there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpipar.comm.mesh import AXES, Grid
from mpipar.errors import ConfigError

sizes = st.tuples(*[st.integers(1, 6)] * len(AXES))


@given(sizes)
def test_coordinates_and_ranks_are_inverse(sizes: tuple[int, ...]) -> None:
    grid = Grid(sizes)
    seen = {tuple(grid.coordinates(rank).values()) for rank in range(grid.num_ranks)}
    assert len(seen) == grid.num_ranks
    assert all(grid.rank(grid.coordinates(rank)) == rank for rank in range(grid.num_ranks))


@given(sizes, st.sampled_from(AXES))
def test_lines_partition_the_ranks(sizes: tuple[int, ...], axis: str) -> None:
    """Every rank is on one line along each axis, at the place of its coordinate."""
    grid = Grid(sizes)
    lines = {tuple(grid.line(rank, axis)) for rank in range(grid.num_ranks)}
    assert sorted(rank for line in lines for rank in line) == list(range(grid.num_ranks))
    for rank in range(grid.num_ranks):
        assert grid.line(rank, axis)[grid.coordinates(rank)[axis]] == rank


def test_a_thousand_ranks() -> None:
    grid = Grid.of(1024, pp=4, tp=8)
    assert grid.size("dp") == 32 and grid.size("cp") == 1
    assert grid.line(0, "tp") == list(range(8)), "the ranks of one layer are neighbours"
    assert grid.coordinates(1023) == {"pp": 3, "dp": 31, "cp": 0, "tp": 7}


@pytest.mark.parametrize(
    ("num_ranks", "sizes", "reason"),
    [
        (8, {"tp": 3}, "does not fit 8 ranks"),
        (8, {"dp": 4}, "does not fit 8 ranks"),
        (8, {"tp": 0}, "does not fit"),
        (8, {"ep": 2}, "no axis 'ep'"),
    ],
)
def test_grids_that_cannot_be(num_ranks: int, sizes: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Grid.of(num_ranks, **sizes)
