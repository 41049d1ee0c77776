"""One size of one question: the memory that all contestants use, and what a contestant is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.limits import Bytes
from mpipar.comm import Mesh
from mpipar.comm.arena import Arena, arena_bytes
from mpipar.comm.buffers import Buffer

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do what a question asks for, ready to be timed.

    Args:
        title: For people.
        source: Where the check puts what this rank gives.
        result: Where the check then looks for what this rank is to get; may overlap with `source`.
        calls: What is timed, by name. Of several, the fastest for a size stands for the contestant.
        ours: Whether it is mpipar, or a peer of it.
        operations: How many operations one call makes: its time is divided by them.
    """

    title: str
    source: Tensor
    result: Tensor
    calls: dict[str, Callable[[], object]]
    ours: bool = False
    operations: int = 1


class Case:
    """Arrays of one size. Collective to build.

    Args:
        mesh: The ranks of the job.
        elements: Of an array: a multiple of the number of ranks.
        dtype: Of the elements.
        num_arrays: How many of them the operation needs.
        num_doubles: How many arrays of as many float64 elements it needs beside.

    Attributes:
        shared: [num_arrays][elements] in memory that all ranks see, or why there is none.
        doubles: [num_doubles][elements] float64 there.
    """

    shared: list[Tensor] | str

    def __init__(self, mesh: Mesh, elements: int, dtype: torch.dtype, num_arrays: int, num_doubles: int = 0):
        self.mesh = mesh
        self.world = mesh.world
        self.elements = elements
        self.dtype = dtype
        sizes = [self.num_bytes] * num_arrays + [8 * elements] * num_doubles
        self.doubles: list[Tensor] = []
        self._arena = self.world.open_arena(arena_bytes(sizes))
        if isinstance(self._arena, str):
            self.shared = self._arena
        else:
            self.shared = [self._arena.allocate(elements, dtype, _CPU) for _ in range(num_arrays)]
            self.doubles = [self._arena.allocate(elements, torch.float64, _CPU) for _ in range(num_doubles)]

    @property
    def num_bytes(self) -> int:
        """Of an array."""
        return self.elements * self.dtype.itemsize

    @property
    def chunk(self) -> slice:
        """This rank's elements, where each has its equal part of an array."""
        return self.world.chunk(self.elements)

    def private(self, elements: int | None = None) -> Tensor:
        """[elements] zeros, by default of the size of the case, in ordinary memory."""
        return torch.zeros(self.elements if elements is None else elements, dtype=self.dtype)

    def everybodys(self) -> list[list[Bytes]] | None:
        """The bytes of the shared arrays, [num_arrays][ranks]; None if there are none."""
        if not isinstance(self._arena, Arena) or isinstance(self.shared, str):
            return None
        columns = [self._arena.column(Buffer(array.view(torch.uint8))) for array in self.shared]
        return [[buffer.values for buffer in column or ()] for column in columns]

    def touch(self, x: Tensor) -> None:
        """Writes zeros all over an array, in ordinary stores: as after backward, it is then in this core's caches.

        Where ranks share memory, adding up what nobody has written since the last time would be too easy.
        """
        words = x.view(torch.uint8).numpy()
        (words.view(np.uint32) if words.size % 4 == 0 else words).fill(0)

    def close(self) -> None:
        """Collective: the shared memory is as good as gone."""
        if not isinstance(self._arena, str):
            self.world.close_arena(self._arena)
