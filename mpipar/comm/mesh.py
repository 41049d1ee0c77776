"""The mesh: ranks arranged along named axes, and a communicator for each axis.

    axis   what differs along it                      how far apart
    pp     pipeline stage                             outermost: small messages between neighbours
    dp     replica of the model
    cp     part of the sequence
    tp     part of each layer                         innermost: neighbours in rank, on one host

A rank is global; a coordinate is along one axis. `Grid` is the arithmetic between them, without MPI, so that a mesh of
1,024 ranks can be examined on a laptop. `Mesh` is the grid of a running job with its communicators; layers and
reducers are given the communicator of their axis, never the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mpipar.comm.communicator import Communicator
from mpipar.comm.cores import cores_per_rank
from mpipar.errors import ConfigError

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class Grid:
    """Sizes of the axes, from the outermost to the innermost; rank order is row-major.

    Args:
        sizes: A size for each of `AXES`.
    """

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, num_ranks: int, **sizes: int) -> Grid:
        """The grid of `num_ranks` with the given sizes. Axes that are not named have size 1; dp takes what is left.

        Raises:
            ConfigError: The sizes do not multiply to the number of ranks.
        """
        unknown = set(sizes) - set(AXES)
        if unknown:
            raise ConfigError(f"a mesh has no axis {sorted(unknown)[0]!r}: its axes are {', '.join(AXES)}")
        given = math.prod(sizes.values())
        if "dp" not in sizes and given >= 1 and num_ranks % given == 0:
            sizes["dp"] = num_ranks // given
        if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != num_ranks:
            shape = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES if axis in sizes)
            raise ConfigError(
                f"a mesh of {shape} does not fit {num_ranks} ranks: their product must be the number of ranks"
            )
        return cls(tuple(sizes.get(axis, 1) for axis in AXES))

    @property
    def num_ranks(self) -> int:
        return math.prod(self.sizes)

    def size(self, axis: str) -> int:
        """The number of coordinates along an axis."""
        return self.sizes[AXES.index(axis)]

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank is: its coordinate along each axis."""
        coordinates = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, coordinates[axis] = divmod(rank, size)
        return {axis: coordinates[axis] for axis in AXES}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """Which rank is at these coordinates."""
        rank = 0
        for axis, size in zip(AXES, self.sizes, strict=True):
            rank = rank * size + coordinates[axis]
        return rank

    def line(self, rank: int, axis: str) -> list[int]:
        """The ranks that differ from this one along `axis` only, in the order of their coordinates: its peers."""
        here = self.coordinates(rank)
        return [self.rank({**here, axis: coordinate}) for coordinate in range(self.size(axis))]


class Mesh:
    """The grid of this job, and this rank's place in it. Collective to build.

    Args:
        world: All ranks of the job.
        grid: How they are arranged.

    Attributes:
        cores_per_rank: How many of this host's cores a rank may use for its threads.
    """

    def __init__(self, world: Communicator, grid: Grid):
        assert grid.num_ranks == world.size
        self.world = world
        self.grid = grid
        self.coordinates = grid.coordinates(world.rank)
        self.host = world.split_by_host()
        self.cores_per_rank = cores_per_rank(self.host)
        self.num_hosts = world.all_gather_object(self.host.rank).count(0)
        self._axes = {axis: self._line(axis) for axis in AXES}

    def __getitem__(self, axis: str) -> Communicator:
        """The communicator of the ranks that differ from this one along `axis` only; its rank is the coordinate."""
        return self._axes[axis]

    def _line(self, axis: str) -> Communicator:
        line = self.grid.line(self.world.rank, axis)
        return self.world.split(axis, color=line[0], key=self.coordinates[axis])
