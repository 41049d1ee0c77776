"""What the rest of mpipar sees of communication: the ranks of one mesh axis and the operations between them.

Array messages and object messages never share a method: `broadcast` moves the memory of an array, in place and at
full speed, `broadcast_object` pickles anything.

All arrays may be torch tensors, numpy arrays or CuPy arrays (see `buffers`), and every operation works in place. A
call is collective: all ranks of the communicator make the same calls, in the same order, with equal sizes and dtypes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from mpipar.comm import p2p, ring, shared
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.mpi import MPI
from mpipar.comm.p2p import Account, Wire
from mpipar.comm.progress import Algorithm, Progress, Work
from mpipar.comm.shared import Arena

Array = TypeVar("Array")


class Communicator:
    """The ranks of one axis.

    Args:
        comm: An MPI communicator that is used by nobody else: a duplicate or the result of a split.
        name: The axis, as it appears in messages.
        progress: What drives the operations of all communicators of this process.
    """

    def __init__(self, comm: MPI.Comm, name: str, progress: Progress):
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.name = name
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.progress = progress
        self._comm = comm
        self._sequence = 0
        self._arenas: list[Arena] = []
        self._account = Account()

    @classmethod
    def world(cls, timeout_s: float = 600.0) -> Communicator:
        """All ranks of the job. A duplicate of MPI's world: revoking the world itself, after a failure, can hang."""
        return cls(MPI.COMM_WORLD.Dup(), "world", Progress(timeout_s))

    def split(self, name: str, color: int, key: int) -> Communicator:
        """Collective: the communicator of those ranks that gave the same `color`, in the order of their `key`."""
        return Communicator(self._comm.Split(color, key), name, self.progress)

    def split_by_host(self) -> Communicator:
        """Collective: the communicator of the ranks on this host, in the order of their ranks here."""
        return Communicator(self._comm.Split_type(MPI.COMM_TYPE_SHARED, self.rank), "host", self.progress)

    def duplicate(self, name: str) -> Communicator:
        """Collective: the same ranks, with messages of their own."""
        return Communicator(self._comm.Dup(), name, self.progress)

    def free(self) -> None:
        """Collective: gives back what MPI keeps for this communicator."""
        self.progress.release(id(self))
        self._comm.Free()

    def abort(self, code: int) -> None:
        """Ends all ranks of the job, at once."""
        self._comm.Abort(code)

    @property
    def bytes_sent(self) -> int:
        """Bytes of array elements that this rank has sent in operations that it has started here."""
        return self._account.bytes_sent

    # Arrays

    def all_reduce(self, x: Array, op: Op = "sum") -> Array:
        """x becomes the sum, mean or maximum over all ranks, on all ranks; returns x."""
        self.start_all_reduce(x, op).wait()
        return x

    def start_all_reduce(self, x: Any, op: Op = "sum") -> Work:
        """Like `all_reduce`, but returns at once. x must not be touched before the work is done."""
        return self._start_reduction("all_reduce", x, op, shared.all_reduce, ring.all_reduce)

    def reduce_scatter(self, x: Any, op: Op = "sum") -> None:
        """Chunk `rank` of the flattened x (see `chunk`) becomes its sum over all ranks; the rest of x is undefined."""
        self.start_reduce_scatter(x, op).wait()

    def start_reduce_scatter(self, x: Any, op: Op = "sum") -> Work:
        """Like `reduce_scatter`, but returns at once."""
        return self._start_reduction("reduce_scatter", x, op, shared.reduce_scatter, ring.reduce_scatter)

    def all_gather(self, x: Array) -> Array:
        """Every rank gives its chunk of the flattened x (see `chunk`); x becomes all chunks, on all ranks."""
        self.start_all_gather(x).wait()
        return x

    def start_all_gather(self, x: Any) -> Work:
        """Like `all_gather`, but returns at once."""
        buffer = Buffer(x)
        column = self._column(buffer)
        if column is not None:
            return self._start("all_gather", lambda wire: shared.all_gather(wire, column))
        return self._start("all_gather", lambda wire: ring.all_gather(wire, buffer))

    def broadcast(self, x: Array, root: int = 0) -> Array:
        """x becomes that of rank `root`, on all ranks; returns x."""
        self.start_broadcast(x, root).wait()
        return x

    def start_broadcast(self, x: Any, root: int = 0) -> Work:
        """Like `broadcast`, but returns at once."""
        buffer = Buffer(x, writable=self.rank != p2p.check_peer(root, self.size))
        return self._start("broadcast", lambda wire: ring.broadcast(wire, buffer, root))

    def chunk(self, size: int, rank: int | None = None) -> slice:
        """The elements of an array of `size` that `reduce_scatter` and `all_gather` give to a rank (to this one)."""
        rank = self.rank if rank is None else rank
        bounds = ring.chunk_bounds(size, self.size)
        return slice(bounds[rank], bounds[rank + 1])

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self._start("barrier", p2p.barrier).wait()

    # Arrays, between two ranks

    def send(self, x: Any, to: int, tag: int = 0) -> None:
        """Sends x to one rank, which receives it into an array of the same size and dtype."""
        self.start_send(x, to, tag).wait()

    def start_send(self, x: Any, to: int, tag: int = 0) -> Work:
        """Like `send`, but returns at once. x must not be changed before the work is done."""
        buffer = Buffer(x, writable=False)
        p2p.check_peer(to, self.size)
        return self._start_p2p(f"send to rank {to}", tag, lambda wire: p2p.send(wire, buffer, to))

    def receive(self, x: Array, source: int, tag: int = 0) -> Array:
        """Receives what `source` sends into x; returns x."""
        self.start_receive(x, source, tag).wait()
        return x

    def start_receive(self, x: Any, source: int, tag: int = 0) -> Work:
        """Like `receive`, but returns at once. x is undefined before the work is done."""
        buffer = Buffer(x)
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

    def open_arena(self, num_bytes: int) -> Arena | str:
        """Collective: shared memory of `num_bytes` a rank, in which this communicator then reduces in place.

        All ranks come to the same: the arena, or why there can be none.
        """
        if self.size == 1:
            return "there is one rank"
        host = self.split_by_host()
        on_one_host = host.size == self.size
        host.free()
        if not on_one_host:
            return "the ranks are on several hosts"
        arena = shared.open_arena(self.all_gather_object, self.rank, num_bytes)
        if isinstance(arena, Arena):
            self._arenas.append(arena)
        return arena

    def close_arena(self, arena: Arena) -> None:
        """Collective: from now on what lies in the arena is memory like any other. It is freed with its last array."""
        self._arenas.remove(arena)

    def _column(self, buffer: Buffer) -> list[Buffer] | None:
        """What lies where the buffer lies on each rank of an arena; None if it is memory of this process alone."""
        return next((column for arena in self._arenas if (column := arena.column(buffer)) is not None), None)

    # What all operations share

    def _start(self, name: str, algorithm: Callable[[Wire], Algorithm]) -> Work:
        """Starts the next collective of this communicator."""
        self._sequence += 1
        wire = Wire.for_collective(self._comm, self._sequence, self._account)
        work = Work(self.progress, f"{name} #{self._sequence}", self.name, algorithm(wire))
        return self.progress.start(work, id(self))

    def _start_reduction(
        self,
        name: str,
        x: Any,
        op: Op,
        in_place: Callable[[Wire, list[Buffer], Op], Algorithm],
        around: Callable[[Wire, Buffer, Op], Algorithm],
    ) -> Work:
        """Starts the next collective, one that adds: in the arena if x lies in it, else round the ring."""
        buffer = Buffer(x)
        buffer.require(op)
        column = self._column(buffer)
        if column is not None:
            return self._start(f"{name}({op})", lambda wire: in_place(wire, column, op))
        return self._start(f"{name}({op})", lambda wire: around(wire, buffer, op))

    def _start_p2p(self, name: str, tag: int, algorithm: Callable[[Wire], Algorithm]) -> Work:
        """Starts a message of a user's tag."""
        wire = Wire(self._comm, p2p.check_tag(tag), self._account)
        return self.progress.start_now(Work(self.progress, name, self.name, algorithm(wire)))
