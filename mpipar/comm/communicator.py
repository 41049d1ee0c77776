"""What the rest of mpipar sees of communication: the ranks of one mesh axis and the operations between them.

Array messages and object messages never share a method: `broadcast` moves the memory of an array, in place and at
full speed, `broadcast_object` pickles anything.

All arrays may be torch tensors, numpy arrays or CuPy arrays (see `buffers`), and every operation works in place. A
call is collective: all ranks of the communicator make the same calls, in the same order, with equal sizes and dtypes.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from mpipar.comm import exchange, hierarchical, native, p2p, ring, shared
from mpipar.comm.arena import Arena, open_arena
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.call import Call, checksum, compared, is_compared
from mpipar.comm.host import HOST_BYTES, Host, open_host
from mpipar.comm.mpi import MPI
from mpipar.comm.p2p import Account, Wire, chunk_bounds
from mpipar.comm.prepared import Operation, Prepared
from mpipar.comm.progress import Algorithm, Progress, Work
from mpipar.comm.roster import Roster
from mpipar.comm.select import AllReduce, select
from mpipar.comm.small import plan_small_sum
from mpipar.comm.topology import Topology
from mpipar.errors import MessageError

Array = TypeVar("Array")


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
        self._arenas: list[Arena] = []
        self._account = Account()
        self._prepared = Prepared()
        # Where the ranks of this host meet, or why they cannot; and the same, if all ranks are on it.
        self._host: Host | str = "it is not known yet"
        self._only_host: Host | None = None
        self._host = self._open_host()
        self._sequence = 0  # what a user calls is numbered from 1
        if self.topology.num_hosts == 1 and isinstance(self._host, Host):
            self._only_host = self._host

    @classmethod
    def world(cls, timeout_s: float = 600.0) -> Communicator:
        """All ranks of the job. A duplicate of MPI's world: revoking the world itself, after a failure, can hang."""
        comm = MPI.COMM_WORLD.Dup()
        return cls(comm, "world", Progress(timeout_s), Roster.take(comm))

    def derive(self, comm: MPI.Comm, name: str) -> Communicator:
        """Collective between the ranks of `comm`, which are some of these: the communicator of them."""
        ranks = MPI.Group.Translate_ranks(comm.Get_group(), None, self._comm.Get_group())
        return Communicator(comm, name, self.progress, self.roster.among(ranks))

    def split(self, name: str, color: int, key: int) -> Communicator:
        """Collective: the communicator of those ranks that gave the same `color`, in the order of their `key`."""
        return self.derive(self._comm.Split(color, key), name)

    def split_by_host(self) -> Communicator:
        """Collective: the communicator of the ranks on this host, in the order of their ranks here."""
        return self.split("host", color=self.topology.neighbours(self.rank)[0], key=self.rank)

    def duplicate(self, name: str) -> Communicator:
        """Collective: the same ranks, with messages of their own."""
        return self.derive(self._comm.Dup(), name)

    def free(self) -> None:
        """Collective: gives back what MPI keeps for this communicator."""
        self.progress.close_lane(self._lane)
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
        operation = self._prepared.find((id(x), op, algorithm), x)
        small = operation.small if operation is not None else None
        if operation is None or small is None or not self._lane.is_free:
            self.start_all_reduce(x, op, algorithm).wait()
            return x
        self._sequence += 1
        if not small.at_once():
            self._work(operation.call, small.rest()).wait()
        return x

    def start_all_reduce(self, x: Any, op: Op = "sum", algorithm: AllReduce = "auto") -> Work:
        """Like `all_reduce`, but returns at once. x must not be touched before the work is done."""
        key = id(x), op, algorithm
        operation = self._prepared.find(key, x)
        if operation is None:
            operation = self._prepare_all_reduce(Buffer(x), op, algorithm)
            self._prepared.keep(key, x, operation)
        return self._start(operation)

    def start_all_reduce_into(self, into: Tensor, x: Tensor) -> Work:
        """Starts: `into` becomes the sum of x over all ranks, converted once, at the end. x is undefined then.

        Args:
            into: Of the size of x, and of another dtype; where one of both lies in an arena, so does the other.
            x: float32 or float64, the same size and dtype on all ranks.
        """
        key = id(x), "sum", f"into {id(into)}"
        operation = self._prepared.find(key, x)
        if operation is None:
            operation = self._prepare_all_reduce_into(Buffer(into), Buffer(x))
            self._prepared.keep(key, x, replace(operation, keeps=into))
        return self._start(operation)

    def _prepare_all_reduce_into(self, into: Buffer, x: Buffer) -> Operation:
        column, place = self._locate(x)
        targets, target_place = self._locate(into)
        host = self._only_host if self.roster.wants in ("auto", "shared") else None
        if host is not None and column is not None and targets is not None:
            call = Call("all_reduce(sum)", x.dtype, x.size, checksum([place, target_place]))
            return Operation(call, begin=shared.all_reduce_into(host, column, targets, call))
        return self._prepare_all_reduce(x, "sum", "auto").followed_by(partial(into.convert, x))

    def _prepare_all_reduce(self, x: Buffer, op: Op, algorithm: AllReduce) -> Operation:
        x.require(op)
        column, place = self._locate(x)
        host = self._host if isinstance(self._host, Host) else None
        chosen = self._select(algorithm, x, column, op)
        in_place = chosen == "hierarchical" or (
            chosen == "shared" and host is not None and column is not None and shared.pays_in_place(host, x)
        )
        call = Call(f"all_reduce({op})", x.dtype, x.size, place if in_place else 0)
        if chosen == "shared":
            assert host is not None
            if column is not None and in_place:
                return Operation(call, begin=shared.all_reduce(host, column, op, call))
            small = plan_small_sum(host, x, op, call) if shared.takes_one_meeting(host, x) else None
            if small is not None:
                return Operation(call, begin=small.whole, small=small)
            return Operation(call, begin=shared.all_reduce_through_slots(host, x, op, call))
        if chosen == "hierarchical":
            assert column is not None
            return Operation(
                call, send=lambda wire: hierarchical.all_reduce(wire, self.topology, host, column, op, call)
            )
        if chosen == "mpi":
            return Operation(call, send=lambda wire: native.all_reduce(wire, x, op))
        return Operation(call, send=lambda wire: ring.all_reduce(self._by_host(wire), x, op))

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
        buffer = Buffer(x)
        buffer.require(op)
        bounds = self._bounds(buffer, sizes)
        column, place = self._locate(buffer)
        call = Call(f"reduce_scatter({op})", buffer.dtype, buffer.size, checksum([place, *bounds]))
        if column is not None and self._only_host is not None:
            return self._start(Operation(call, begin=shared.reduce_scatter(self._only_host, column, op, call, bounds)))
        return self._send(call, lambda wire: ring.reduce_scatter(self._by_host(wire), buffer, op, bounds))

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
        buffer = Buffer(x)
        bounds = self._bounds(buffer, sizes)
        column, place = self._locate(buffer)
        call = Call("all_gather", buffer.dtype, buffer.size, checksum([place, *bounds]))
        if column is not None and self._only_host is not None:
            return self._start(Operation(call, begin=shared.all_gather(self._only_host, column, call, bounds)))
        return self._send(call, lambda wire: ring.all_gather(self._by_host(wire), buffer, bounds))

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
        given, taken = Buffer(out, writable=False), Buffer(into)
        if given.dtype != taken.dtype:
            raise MessageError(f"all_to_all from {given.dtype} into {taken.dtype}: both must have one dtype")
        if given.overlaps(taken):
            raise MessageError("all_to_all into the memory that it sends from: give two arrays")
        out_bounds = self._bounds(given, self._even(given) if out_sizes is None else out_sizes)
        into_bounds = self._bounds(taken, self._even(taken) if into_sizes is None else into_sizes)
        call = Call("all_to_all", given.dtype)
        return self._send(call, lambda wire: exchange.all_to_all(wire, given, taken, out_bounds, into_bounds))

    def broadcast(self, x: Array, root: int = 0) -> Array:
        """x becomes that of rank `root`, on all ranks; returns x."""
        self.start_broadcast(x, root).wait()
        return x

    def start_broadcast(self, x: Any, root: int = 0) -> Work:
        """Like `broadcast`, but returns at once."""
        buffer = Buffer(x, writable=self.rank != p2p.check_peer(root, self.size))
        call = Call("broadcast", buffer.dtype, buffer.size, root)
        return self._send(call, lambda wire: ring.broadcast(self._by_host(wire), buffer, root))

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
        call = Call("barrier")
        if (host := self._only_host) is not None:
            self._start(Operation(call, begin=lambda: shared.barrier(host, call))).wait()
        else:
            self._send(call, p2p.barrier).wait()

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
        """Collective: memory of `num_bytes` a rank, shared on its host, in which arrays are reduced in place.

        All ranks come to the same: an arena on each host, or why there can be none.
        """
        if self.topology.num_hosts == self.size:
            return "there is one rank" if self.size == 1 else "each host has one rank"
        neighbours = self.topology.neighbours(self.rank)
        reason = self._host if isinstance(self._host, str) and len(neighbours) > 1 else None
        arena: Arena | str | None = None
        if not any(self.all_gather_object(reason)):
            arena = open_arena(self._exchange_on_host, neighbours.index(self.rank), num_bytes)
            reason = arena if isinstance(arena, str) else None
        reasons = [text for text in self.all_gather_object(reason) if text is not None]
        if reasons or not isinstance(arena, Arena):
            return str(reasons[0])
        self._arenas.append(arena)
        self._prepared.clear()
        return arena

    def share_file(self, num_bytes: int) -> int:
        """Collective between ranks of one host: a descriptor of memory that they share, zeros, that has no name."""
        descriptor, process = -1, 0
        if self.rank == 0:
            descriptor, process = os.memfd_create("mpipar-shared"), os.getpid()
            os.ftruncate(descriptor, num_bytes)
        theirs, process = self.broadcast_object((descriptor, process))
        if self.rank != 0:
            descriptor = os.open(f"/proc/{process}/fd/{theirs}", os.O_RDWR)
        self.barrier()  # rank 0 is there until all have opened it
        return descriptor

    def adopt_arena(self, arena: Arena, origins: Sequence[int]) -> Arena:
        """The arena of a communicator of which these are the survivors, less the segments of the dead.

        Args:
            arena: What `open_arena` made there.
            origins: Whose its segments are, in their order.
        """
        adopted = arena.less([origins.index(origin) for origin in self.neighbours])
        self._arenas.append(adopted)
        return adopted

    def close_arena(self, arena: Arena) -> None:
        """Collective: from now on what lies in the arena is memory like any other. It is freed with its last array."""
        self._arenas.remove(arena)
        self._prepared.clear()

    def _open_host(self) -> Host | str:
        neighbours = self.topology.neighbours(self.rank)
        if self.topology.num_hosts == self.size:
            return "there is one rank on the host"
        memory = open_arena(self._exchange_on_host, neighbours.index(self.rank), HOST_BYTES)
        return memory if isinstance(memory, str) else open_host(self._comm, memory, neighbours)

    def _exchange_on_host(self, mine: Any) -> list[Any]:
        """The objects of this host's ranks. Through a collective of all ranks, whose wait has a deadline."""
        everybody = self.all_gather_object(mine)
        return [everybody[rank] for rank in self.topology.neighbours(self.rank)]

    def _locate(self, x: Buffer) -> tuple[list[Buffer] | None, int]:
        """What lies where x lies on each rank of the host, and a number for the place, to be compared between ranks.

        (None, 0) if x is memory of this process alone.
        """
        for index, arena in enumerate(self._arenas):
            offset = arena.offset(x)
            if offset is not None:
                return arena.column(x), 1 + offset + (index << 48)
        return None, 0

    # What all operations share

    def _select(self, algorithm: AllReduce, x: Buffer, column: list[Buffer] | None, op: Op) -> AllReduce:
        """Which all-reduce, of those that can be used."""
        usable: set[AllReduce] = {"ring"}
        if self._only_host is not None and x.is_in_host_memory:
            usable.add("shared")
        if self.topology.num_hosts > 1 and column is not None:
            usable.add("hierarchical")
        if native.can_add(x, op):
            usable.add("mpi")
        return select(
            self.roster.wants if algorithm == "auto" else algorithm,
            usable,
            num_hosts=self.topology.num_hosts,
            in_arena=column is not None,
            num_bytes=x.size * x.itemsize,
        )

    def _start(self, operation: Operation) -> Work:
        """Starts the next collective of this communicator."""
        self._sequence = sequence = self._sequence + 1
        if operation.begin is not None:
            steps = operation.begin()
        else:
            assert operation.send is not None
            wire = Wire.for_collective(self._comm, sequence, self._account)
            steps = operation.send(wire)
            if self._only_host is not None:
                steps = shared.after_meeting(self._only_host, operation.call, steps)
            elif is_compared(sequence):
                steps = compared(wire, operation.call, steps)
        return self._work(operation.call, steps)

    def _work(self, call: Call, steps: Algorithm) -> Work:
        """Puts the latest collective behind those that are under way."""
        return self.progress.start(Work(self.progress, self._lane, call, self._sequence, steps))

    def _send(self, call: Call, algorithm: Callable[[Wire], Algorithm]) -> Work:
        """Starts the next collective, one that sends messages."""
        return self._start(Operation(call, send=algorithm))

    def _start_p2p(self, name: str, tag: int, algorithm: Callable[[Wire], Algorithm]) -> Work:
        """Starts a message of a user's tag."""
        wire = Wire(self._comm, p2p.check_tag(tag), self._account)
        return self.progress.start_now(Work(self.progress, self._lane, name, None, algorithm(wire)))

    def _by_host(self, wire: Wire) -> Wire:
        """The wire in the order in which a ring enters and leaves each host once."""
        return wire.among(self.topology.by_host) if self.topology.num_hosts > 1 else wire

    def _bounds(self, x: Buffer, sizes: Sequence[int] | None) -> Sequence[int]:
        """Where the shards of x begin and end, [n + 1]."""
        if sizes is None:
            return chunk_bounds(x.size, self.size)
        bounds = [0, *accumulate(sizes)]
        if len(sizes) != self.size or min(sizes) < 0 or bounds[-1] != x.size:
            raise MessageError(
                f"sizes {list(sizes)} of {len(sizes)} shards do not cut {x.size:,} elements for {self.size} ranks: "
                "give one size a rank, which add up to the array's"
            )
        return bounds

    def _even(self, x: Buffer) -> Sequence[int]:
        """Equal sizes of parts, one a rank."""
        if x.size % self.size:
            raise MessageError(f"{x.size:,} elements cannot be cut into {self.size} equal parts: give their sizes")
        return [x.size // self.size] * self.size
