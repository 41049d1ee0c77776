"""What the ranks of a communicator share on their hosts: the place where they meet, the arenas of their arrays, files.

All ranks open it together, and come to the same: it is there on every host, or there is a reason why it is on none,
which all of them know.
"""

from __future__ import annotations

import os

from mpipar.comm.arena import Arena, open_arena
from mpipar.comm.buffers import Buffer
from mpipar.comm.device.arena import DeviceArena, open_device_arena
from mpipar.comm.device.gpu import Gpu
from mpipar.comm.device.operations import GpuOperations
from mpipar.comm.device.transport import VARIABLE, Transport
from mpipar.comm.host import HOST_BYTES, Host, open_host
from mpipar.comm.mpi import MPI
from mpipar.comm.pending import Finish
from mpipar.comm.segment import Exchange, open_segments
from mpipar.comm.topology import Topology
from mpipar.errors import ConfigError


class Memory:
    """The shared memory of one communicator.

    Args:
        comm: MPI's.
        topology: Which of its ranks share a host.
        exchange: Between all its ranks, in a collective, whose wait has a deadline.
        finish: Runs what this rank waits for alone, with a deadline too.
        transport: What carries arrays on GPUs.
        careful: Whether ranks may die and be survived.
        crowded: Whether this host has fewer cores than ranks.

    Attributes:
        gpus: What can be done in the memory of GPUs that they share.
        host: Where the ranks of this host meet, or why they cannot.
        only_host: The same, if they can and all ranks are on it.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        topology: Topology,
        exchange: Exchange,
        finish: Finish,
        transport: Transport,
        *,
        careful: bool,
        crowded: bool,
    ):
        self.host: Host | str = "it is not known yet"
        self.only_host: Host | None = None
        self._comm = comm
        self._topology = topology
        self._exchange = exchange
        self._finish = finish
        self._neighbours = topology.neighbours(comm.rank)
        self._place = self._neighbours.index(comm.rank)
        self._arenas: list[Arena] = []
        self._transport = transport
        self._careful = careful
        self._crowded = crowded
        self._gpu_arenas: list[tuple[int, DeviceArena]] = []
        self._opened = 0  # of them, so far
        self.gpus = GpuOperations(self._gpu_arenas, alone=comm.size == 1)

    def open_host(self) -> None:
        """Collective: finds out where the ranks of each host meet. What ranks exchange before, they do in messages."""
        if self._topology.num_hosts == self._comm.size:
            self.host = "there is one rank on the host"
            return
        memory = open_arena(self._exchange_on_host, self._place, HOST_BYTES)
        if isinstance(memory, str):
            self.host = memory
        else:
            self.host = open_host(self._comm, memory, self._neighbours, crowded=self._crowded)
        if self._topology.num_hosts == 1 and isinstance(self.host, Host):
            self.only_host = self.gpus.host = self.host

    def open_arena(self, num_bytes: int) -> Arena | str:
        """Collective: see `Communicator.open_arena`."""
        if self._topology.num_hosts == self._comm.size:
            return "there is one rank" if self._comm.size == 1 else "each host has one rank"
        reason = self._agreed(self.host if isinstance(self.host, str) and len(self._neighbours) > 1 else None)
        if reason is not None:
            return reason
        arena = open_arena(self._exchange_on_host, self._place, num_bytes)
        reason = self._agreed(arena if isinstance(arena, str) else None)
        if reason is None and isinstance(arena, Arena):
            self._arenas.append(arena)
            return arena
        return str(reason)

    def open_gpu_arena(self, gpu: Gpu, num_bytes: int) -> DeviceArena | str:
        """Collective: the same in the memory of GPUs.

        Raises:
            ConfigError: There can be none, and the user wants no other transport.
        """
        if self._comm.size == 1:
            return "there is one rank"
        reason: str | None = None
        if self._transport not in ("auto", "ipc"):
            reason = f"{VARIABLE}={self._transport}"
        elif self._topology.num_hosts > 1:
            reason = "there are several hosts, and between them arrays on GPUs pass through the memory of the host"
        elif isinstance(self.host, str):
            reason = self.host
        arena: DeviceArena | str | None = self._agreed(reason)
        if arena is None:
            exchange = self._exchange_on_host
            arena = open_device_arena(exchange, self._finish, gpu, self._place, num_bytes, careful=self._careful)
        if isinstance(arena, DeviceArena):
            self.adopt(arena)
        elif self._transport == "ipc":
            raise ConfigError(f"{VARIABLE}=ipc: {arena}")
        return arena

    def open_file(self, num_bytes: int) -> int | str:
        """Collective: see `Communicator.share_file`."""
        segments = open_segments(self._exchange_on_host, num_bytes, brings=self._place == 0)
        reason = self._agreed(segments if isinstance(segments, str) else None)
        descriptors = [] if isinstance(segments, str) else [segment.descriptor for segment in segments]
        if reason is None:
            (descriptor,) = descriptors
            return descriptor
        for descriptor in descriptors:
            os.close(descriptor)
        return reason

    def adopt(self, arena: Arena | DeviceArena) -> None:
        """From now on what lies in this arena is found."""
        if isinstance(arena, Arena):
            self._arenas.append(arena)
        else:
            self._opened += 1
            self._gpu_arenas.append((self._opened, arena))

    def close(self, arena: Arena | DeviceArena) -> None:
        """Collective: from now on it is not."""
        if isinstance(arena, Arena):
            self._arenas.remove(arena)
            return
        self._exchange(None)  # what is under way in it is through
        self._gpu_arenas[:] = [(number, other) for number, other in self._gpu_arenas if other is not arena]
        self._finish(arena.through())
        arena.close()
        self._exchange(None)  # all have closed it
        arena.release()

    def locate(self, x: Buffer) -> tuple[list[Buffer] | None, int]:
        """What lies where x lies on each rank of the host, and a number for the place, to be compared between ranks.

        (None, 0) if x is memory of this process alone.
        """
        for index, arena in enumerate(self._arenas):
            offset = arena.offset(x)
            if offset is not None:
                return arena.column(x), 1 + offset + (index << 48)
        return None, 0

    def _agreed(self, reason: str | None) -> str | None:
        """Collective: the first reason that any rank has."""
        return next((text for text in self._exchange(reason) if text is not None), None)

    def _exchange_on_host(self, mine: object) -> list[object]:
        """The objects of this host's ranks."""
        everybody = self._exchange(mine)
        return [everybody[rank] for rank in self._neighbours]
