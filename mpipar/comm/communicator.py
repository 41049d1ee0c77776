"""What the rest of mpipar sees of communication: the ranks of one mesh axis and the operations between them.

Array messages and object messages never share a method: `broadcast` moves the memory of an array, in place and at
full speed, `broadcast_object` pickles anything.

All arrays may be torch tensors, numpy arrays or CuPy arrays (see `buffers`), and every operation works in place. A
call is collective: all ranks of the communicator make the same calls, in the same order, with equal sizes and dtypes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mpipar.comm import p2p, shared
from mpipar.comm.arena import Arena
from mpipar.comm.buffers import Op
from mpipar.comm.call import Call, compared, is_compared
from mpipar.comm.deadline import deadline
from mpipar.comm.device import devices
from mpipar.comm.device.arena import DeviceArena
from mpipar.comm.environment import can_survive
from mpipar.comm.host import Host
from mpipar.comm.lane import Work
from mpipar.comm.memory import Memory
from mpipar.comm.mpi import MPI
from mpipar.comm.operations import Operations
from mpipar.comm.p2p import Account, Wire, chunk_bounds
from mpipar.comm.pending import Algorithm
from mpipar.comm.prepared import Operation
from mpipar.comm.progress import Progress
from mpipar.comm.roster import Roster
from mpipar.comm.select import AllReduce
from mpipar.comm.topology import Topology
from mpipar.errors import MessageError

Array = TypeVar("Array")

_CPU = torch.device("cpu")


class Communicator:
    """The ranks of one axis. Collective to build.

    Args:
        comm: An MPI communicator that is used by nobody else: a duplicate or the result of a split.
        name: The axis, as it appears in messages.
        progress: What drives the operations of all communicators of this process.
        roster: Who its ranks are.

    Attributes:
        roster: The same.
        topology: Which of the ranks share a host.
    """

    def __init__(self, comm: MPI.Comm, name: str, progress: Progress, roster: Roster):
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.name = name
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.progress = progress
        self.roster = roster
        self.topology = Topology.of(roster.hosts)
        self._comm = comm
        self._lane = progress.open_lane(name, comm)
        self._sequence = 0
        self._account = Account()
        transport = roster.transport
        self._memory = Memory(
            comm,
            self.topology,
            self.all_gather_object,
            self._finish,
            transport,
            careful=can_survive(),
            crowded=roster.is_crowded(self.topology.neighbours(self.rank)),
        )
        compiled = all(roster.compiled)
        self._operations = Operations(
            self.rank, self.size, self.topology, self._memory, roster.wants, transport, compiled=compiled
        )
        self._memory.open_host()
        self._sequence = 0  # what a user calls is numbered from 1

    @classmethod
    def world(cls, timeout_s: float = 600.0) -> Communicator:
        """All ranks of the job. A duplicate of MPI's world: revoking the world itself, after a failure, can hang."""
        with deadline(timeout_s, "MPI_Comm_dup, to begin"):
            comm = MPI.COMM_WORLD.Dup()
            roster = Roster.take(comm)
        return cls(comm, "world", Progress(timeout_s), roster)

    def derive(self, comm: MPI.Comm, name: str) -> Communicator:
        """Collective between the ranks of `comm`, which are some of these: the communicator of them."""
        ranks = MPI.Group.Translate_ranks(comm.Get_group(), None, self._comm.Get_group())
        return Communicator(comm, name, self.progress, self.roster.among(ranks))

    def split(self, name: str, color: int, key: int) -> Communicator:
        """Collective: the communicator of those ranks that gave the same `color`, in the order of their `key`."""
        with self._together(f"MPI_Comm_split, to make {name!r}"):
            comm = self._comm.Split(color, key)
        return self.derive(comm, name)

    def split_by_host(self) -> Communicator:
        """Collective: the communicator of the ranks on this host, in the order of their ranks here."""
        return self.split("host", color=self.topology.neighbours(self.rank)[0], key=self.rank)

    def duplicate(self, name: str) -> Communicator:
        """Collective: the same ranks, with messages of their own."""
        with self._together(f"MPI_Comm_dup, to make {name!r}"):
            comm = self._comm.Dup()
        return self.derive(comm, name)

    def free(self) -> None:
        """Collective: gives back what MPI keeps for this communicator."""
        self.progress.close_lane(self._lane)
        with deadline(self.progress.timeout_s, f"MPI_Comm_free of {self.name!r}"):
            self._comm.Free()

    @property
    def mpi(self) -> MPI.Comm:
        """What MPI calls it. For this package."""
        return self._comm

    def abort(self, code: int) -> None:
        """Ends all ranks of the job, at once."""
        self._comm.Abort(code)

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks on this host, by their numbers in the job as it started."""
        return tuple(self.roster.origins[rank] for rank in self.topology.neighbours(self.rank))

    @property
    def bytes_sent(self) -> int:
        """Bytes of array elements that this rank has sent in operations that it has started here, MPI's own aside."""
        return self._account.bytes_sent

    # Arrays

    def all_reduce(self, x: Array, op: Op = "sum", algorithm: AllReduce = "auto") -> Array:
        """x becomes the sum, mean or maximum over all ranks, on all ranks; returns x.

        Args:
            x: The same size and dtype on all ranks; at the same place of the same arena, or on no rank in one.
            op: The operation.
            algorithm: One to use where it can be; "auto" is that of MPIPAR_ALLREDUCE, or of the table in `select`.
        """
        operation = self._operations.all_reduce(x, op, algorithm)
        one_call, lane = operation.one_call, self._lane
        if one_call is None or lane.queue or lane.broken is not None:
            self._start(operation).wait()
            return x
        self._sequence += 1
        try:
            rest = None if one_call.at_once() else self._work(operation.call, one_call.rest())
        except BaseException:  # an interrupt: nobody knows how far it is, and the next must not take this one's slots
            if lane.broken is None:
                call = f"{operation.call} #{self._sequence} on axis {self.name!r}"
                lane.broken = MessageError(f"{call} was interrupted")
            raise
        if rest is not None:
            rest.wait()
        return x

    def start_all_reduce(self, x: Any, op: Op = "sum", algorithm: AllReduce = "auto") -> Work:
        """Like `all_reduce`, but returns at once. x must not be touched before the work is done."""
        return self._start(self._operations.all_reduce(x, op, algorithm))

    def start_all_reduce_into(self, into: Tensor, x: Tensor) -> Work:
        """Starts: `into` becomes the sum of x over all ranks, converted once, at the end. x is undefined then.

        Args:
            into: Of the size of x, and of another dtype; where one of both lies in an arena, so does the other.
            x: float32 or float64, the same size and dtype on all ranks.
        """
        return self._start(self._operations.all_reduce_into(into, x))

    def reduce_scatter(self, x: Any, op: Op = "sum", sizes: Sequence[int] | None = None) -> None:
        """Shard `rank` of the flattened x becomes its sum over all ranks; the rest of x is undefined.

        Args:
            x: The same size and dtype on all ranks.
            op: The operation.
            sizes: Elements of each rank's shard, by rank; by default those of `chunk`.
        """
        self.start_reduce_scatter(x, op, sizes).wait()

    def start_reduce_scatter(self, x: Any, op: Op = "sum", sizes: Sequence[int] | None = None) -> Work:
        """Like `reduce_scatter`, but returns at once."""
        return self._start(self._operations.reduce_scatter(x, op, sizes))

    def all_gather(self, x: Array, sizes: Sequence[int] | None = None) -> Array:
        """Every rank gives its shard of the flattened x; x becomes all shards, on all ranks. Returns x.

        Args:
            x: The same size and dtype on all ranks.
            sizes: Elements of each rank's shard, by rank; by default those of `chunk`.
        """
        self.start_all_gather(x, sizes).wait()
        return x

    def start_all_gather(self, x: Any, sizes: Sequence[int] | None = None) -> Work:
        """Like `all_gather`, but returns at once."""
        return self._start(self._operations.all_gather(x, sizes))

    def all_to_all(
        self,
        out: Any,
        into: Array,
        out_sizes: Sequence[int] | None = None,
        into_sizes: Sequence[int] | None = None,
    ) -> Array:
        """Part i of the flattened `out` goes to rank i, where it is part `rank` of `into`. Returns `into`.

        Args:
            out: What this rank has for the others.
            into: What it gets, of the same dtype.
            out_sizes: Elements of each part of `out`, by rank; by default all the same.
            into_sizes: Elements of each part of `into`, by rank. Part i is as large as rank i's part for this rank.
        """
        self.start_all_to_all(out, into, out_sizes, into_sizes).wait()
        return into

    def start_all_to_all(
        self,
        out: Any,
        into: Any,
        out_sizes: Sequence[int] | None = None,
        into_sizes: Sequence[int] | None = None,
    ) -> Work:
        """Like `all_to_all`, but returns at once."""
        return self._start(self._operations.all_to_all(out, into, out_sizes, into_sizes))

    def broadcast(self, x: Array, root: int = 0) -> Array:
        """x becomes that of rank `root`, on all ranks; returns x."""
        self.start_broadcast(x, root).wait()
        return x

    def start_broadcast(self, x: Any, root: int = 0) -> Work:
        """Like `broadcast`, but returns at once."""
        return self._start(self._operations.broadcast(x, root))

    def broadcast_state(self, state: Mapping[str, Tensor], root: int = 0) -> None:
        """Every tensor becomes that of rank `root`, where it lies: a contiguous one in host memory is not copied.

        Args:
            state: Tensors by name; the same names, shapes and dtypes on all ranks.
            root: Whose values they get.

        Raises:
            MessageError: This rank has other names, shapes or dtypes than `root`.
        """
        mine = {name: f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for name, x in state.items()}
        theirs: dict[str, str] = self.broadcast_object(mine, root)
        for name in {**theirs, **mine}:
            here, there = mine.get(name, "absent"), theirs.get(name, "absent")
            if here != there:
                raise MessageError(f"the state of rank {root} is another: {name} is {there} there and {here} here")
        # In the order of the root, which the others may have stored in another.
        works = [self.start_broadcast(state[name].detach(), root) for name in theirs]
        for work in works:
            work.wait()

    def chunk(self, size: int, rank: int | None = None) -> slice:
        """The elements of an array of `size` that `reduce_scatter` and `all_gather` give to a rank (to this one)."""
        rank = self.rank if rank is None else rank
        bounds = chunk_bounds(size, self.size)
        return slice(bounds[rank], bounds[rank + 1])

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self._start(self._operations.barrier()).wait()

    # Arrays, between two ranks

    def send(self, x: Any, to: int, tag: int = 0) -> None:
        """Sends x to one rank, which receives it into an array of the same size and dtype."""
        self.start_send(x, to, tag).wait()

    def start_send(self, x: Any, to: int, tag: int = 0) -> Work:
        """Like `send`, but returns at once. x must not be changed before the work is done.

        What is on a GPU is sent when it has come from there, as soon as this rank waits for anything, or tests.
        """
        buffer = self._operations.buffer(x, writable=False)
        p2p.check_peer(to, self.size)
        return self._start_p2p(f"send to rank {to}", tag, lambda wire: p2p.send(wire, buffer, to))

    def receive(self, x: Array, source: int, tag: int = 0) -> Array:
        """Receives what `source` sends into x; returns x."""
        self.start_receive(x, source, tag).wait()
        return x

    def start_receive(self, x: Any, source: int, tag: int = 0) -> Work:
        """Like `receive`, but returns at once. x is undefined before the work is done."""
        buffer = self._operations.buffer(x, reads=False)
        p2p.check_peer(source, self.size)
        return self._start_p2p(f"receive from rank {source}", tag, lambda wire: p2p.receive(wire, buffer, source))

    # Objects

    def broadcast_object(self, value: Any = None, root: int = 0) -> Any:
        """The object of rank `root`, on all ranks."""
        packed = np.frombuffer(pickle.dumps(value), np.uint8) if self.rank == root else np.empty(0, np.uint8)
        length = self.broadcast(np.array([packed.size]), root)
        if self.rank != root:
            packed = np.empty(int(length[0]), np.uint8)
        return pickle.loads(self.broadcast(packed, root).tobytes())

    def all_gather_object(self, value: Any) -> list[Any]:
        """The objects of all ranks, by rank, on all ranks."""
        packed = np.frombuffer(pickle.dumps(value), np.uint8)
        lengths = np.zeros(self.size, np.int64)
        lengths[self.rank] = packed.size
        self.all_gather(lengths)
        room = int(lengths.max())  # chunks of equal size: what `all_gather` cuts is then what each rank put in
        gathered = np.zeros((self.size, room), np.uint8)
        gathered[self.rank, : packed.size] = packed
        self.all_gather(gathered)
        return [pickle.loads(gathered[r, : lengths[r]].tobytes()) for r in range(self.size)]

    # Shared memory

    def open_arena(self, num_bytes: int, device: torch.device = _CPU) -> Arena | DeviceArena | str:
        """Collective: memory of `num_bytes` a rank, shared on its host, in which arrays are reduced in place.

        All ranks come to the same: an arena on each host, or why there can be none.

        Args:
            num_bytes: What `allocate` will be asked for, with the alignment of `arena_bytes`.
            device: Where: the CPU, or this rank's GPU, on all ranks alike.

        Raises:
            ConfigError: CuPy is missing, or MPIPAR_CUDA=ipc and the ranks cannot open each other's memory.
        """
        gpu = devices.gpu_on(device)
        arena = self._memory.open_arena(num_bytes) if gpu is None else self._memory.open_gpu_arena(gpu, num_bytes)
        self._operations.forget()
        if isinstance(arena, DeviceArena):
            self.progress.gpus[arena.gpu] = arena.stream
        return arena

    def share_file(self, num_bytes: int) -> int | str:
        """Collective: a descriptor of memory that the ranks of a host share, zeros, that has no name.

        All ranks come to the same: a descriptor on each host, or why there can be none.
        """
        return self._memory.open_file(num_bytes)

    def adopt_arena(self, arena: Arena | DeviceArena, origins: Sequence[int]) -> Arena | DeviceArena:
        """Collective: the arena of a communicator of which these are the survivors, less the segments of the dead.

        Args:
            arena: What `open_arena` made there.
            origins: Whose its segments are, in their order.
        """
        if isinstance(arena, DeviceArena):
            self._finish(arena.through())
        adopted = arena.less([origins.index(origin) for origin in self.neighbours])
        self._memory.adopt(adopted)
        host = self._memory.host
        if isinstance(adopted, DeviceArena) and isinstance(host, Host):
            # What the streams of the others have done in the segments comes before what is done there from now on.
            self._start(Operation(Call("barrier"), begin=lambda: adopted.part(host))).wait()
        return adopted

    def close_arena(self, arena: Arena | DeviceArena) -> None:
        """Collective: from now on what lies in the arena is memory like any other. It is freed with its last array."""
        self._memory.close(arena)
        self._operations.forget()

    def catch_up(self, device: torch.device) -> None:
        """Returns when a GPU has done what torch's current stream was given. On the CPU that is so.

        What is read behind it (`tolist`, `cpu`) waits for its own copy and for nothing else. Without it the host would
        wait there, without a deadline, for whatever the stream waits for: a kernel that does not end, or another rank.

        Raises:
            StallError: It has not, in time.
        """
        gpu = devices.gpu_on(device)
        if gpu is not None:
            self._finish(gpu.through(gpu.runtime.current_stream("torch")))

    def finish_gpus(self) -> None:
        """Returns when this rank has done, on its GPUs, what it was to do in memory that ranks share."""
        for gpu, stream in self.progress.gpus.items():
            self._finish(gpu.through(stream))

    # What all operations share

    @contextmanager
    def _together(self, call: str) -> Iterator[None]:
        """Collective: around a call of MPI that has no deadline. Where the ranks meet before, the missing are named."""
        self.barrier()
        with deadline(self.progress.timeout_s, call):
            yield

    def _start(self, operation: Operation) -> Work:
        """Starts the next collective of this communicator."""
        self._sequence = sequence = self._sequence + 1
        if operation.begin is not None:
            steps = operation.begin()
        else:
            assert operation.send is not None
            wire = Wire.for_collective(self._comm, sequence, self._account)
            steps = operation.send(wire)
            if self._memory.only_host is not None:
                steps = shared.after_meeting(self._memory.only_host, operation.call, steps)
            elif is_compared(sequence):
                steps = compared(wire, operation.call, steps)
        return self._work(operation.call, steps)

    def _work(self, call: Call, steps: Algorithm) -> Work:
        """Puts the latest collective behind those that are under way."""
        return self.progress.start(Work(self.progress, self._lane, call, self._sequence, steps))

    def _finish(self, algorithm: Algorithm) -> None:
        """Waits for what this rank has asked of its GPU."""
        self.progress.start_now(Work(self.progress, self._lane, "work on the GPU", None, algorithm)).wait()

    def _start_p2p(self, name: str, tag: int, algorithm: Callable[[Wire], Algorithm]) -> Work:
        """Starts a message of a user's tag."""
        wire = Wire(self._comm, p2p.check_tag(tag), self._account)
        return self.progress.start_now(
            Work(self.progress, self._lane, name, None, algorithm(wire), channel=(name, tag))
        )
