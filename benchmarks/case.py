"""One size of one question: the memory that all contestants use, and what a contestant is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.limits import Bytes, Copy, copying
from mpipar.comm import Mesh
from mpipar.comm.arena import Arena, arena_bytes
from mpipar.comm.buffers import Buffer
from mpipar.comm.device.arena import DeviceArena

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
        device: Where they are.

    Attributes:
        shared: [num_arrays][elements] in memory that all ranks see, or why there is none.
        doubles: [num_doubles][elements] float64 there.
    """

    shared: list[Tensor] | str

    def __init__(
        self,
        mesh: Mesh,
        elements: int,
        dtype: torch.dtype,
        num_arrays: int,
        num_doubles: int = 0,
        device: torch.device = _CPU,
    ):
        self.mesh = mesh
        self.world = mesh.world
        self.elements = elements
        self.dtype = dtype
        self.device = device
        sizes = [self.num_bytes] * num_arrays + [8 * elements] * num_doubles
        self.doubles: list[Tensor] = []
        self._arena = self.world.open_arena(arena_bytes(sizes), device)
        if isinstance(self._arena, str):
            self.shared = self._arena
        else:
            self.shared = [self._arena.allocate(elements, dtype, device) for _ in range(num_arrays)]
            self.doubles = [self._arena.allocate(elements, torch.float64, device) for _ in range(num_doubles)]

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
        return torch.zeros(self.elements if elements is None else elements, dtype=self.dtype, device=self.device)

    def settle(self) -> None:
        """Waits until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def copying(self, copies: Sequence[Copy]) -> Callable[[], None] | None:
        """What makes these copies of this rank between the shared arrays; None if there are none.

        On a GPU it gives them to the device, as a collective would, and returns.
        """
        if isinstance(self._arena, DeviceArena) and not isinstance(self.shared, str):
            return _copying_on_gpu(self._arena, self.shared, copies)
        memory = self.everybodys()
        return None if memory is None else copying(memory, copies)

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
        if x.is_cuda:
            x.zero_()
            self.settle()
            return
        words = x.view(torch.uint8).numpy()
        (words.view(np.uint32) if words.size % 4 == 0 else words).fill(0)

    def close(self) -> None:
        """Collective: the shared memory is as good as gone."""
        if not isinstance(self._arena, str):
            self.world.close_arena(self._arena)


def _copying_on_gpu(arena: DeviceArena, shared: Sequence[Tensor], copies: Sequence[Copy]) -> Callable[[], None]:
    runtime = arena.gpu.runtime
    offsets = [arena.offset(x.data_ptr(), x.numel() * x.element_size()) or 0 for x in shared]
    planned = [
        (*(arena.rows[place.rank] + offsets[place.array] + place.start for place in (target, source)), num_bytes)
        for source, target, num_bytes in copies
    ]

    def run() -> None:
        for target, source, num_bytes in planned:
            runtime.copy(target, source, num_bytes, arena.stream)

    return run
