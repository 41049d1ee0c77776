"""What a call of a collective comes to: its arguments checked, its algorithm chosen, ready to begin.

Nothing is sent here. What is prepared for a tensor is kept, for the next call with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from torch import Tensor

from mpipar.comm import exchange, hierarchical, native, p2p, ring, shared
from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.call import ALGORITHM_BITS, ON_GPU, Call, checksum
from mpipar.comm.device import devices
from mpipar.comm.device.on_gpu import OnGpu
from mpipar.comm.device.transport import Transport
from mpipar.comm.host import Host
from mpipar.comm.memory import Memory
from mpipar.comm.one_call import SumThroughSlots, can_sum_through_slots, plan_sum_in_place
from mpipar.comm.p2p import Wire, chunk_bounds
from mpipar.comm.prepared import Operation, Prepared
from mpipar.comm.select import AllReduce, select
from mpipar.comm.topology import Topology
from mpipar.errors import MessageError


class Operations:
    """The collectives of one communicator on one of its ranks. Their arguments are those of `Communicator`.

    Args:
        rank: The rank.
        size: How many there are.
        topology: Which of them share a host.
        memory: What they share there.
        wants: Which all-reduce the user's environment asks for.
        transport: What carries arrays on GPUs.
        compiled: Whether sums on a host can be one compiled call, on all of them.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        topology: Topology,
        memory: Memory,
        wants: AllReduce,
        transport: Transport,
        *,
        compiled: bool,
    ):
        self._rank = rank
        self._size = size
        self._topology = topology
        self._memory = memory
        self._wants = wants
        self._transport = transport
        self._compiled = compiled
        self.prepared = Prepared()

    def forget(self) -> None:
        """Other memory is shared from now on, so other algorithms can be used."""
        self.prepared.clear()

    def all_reduce(self, x: Any, op: Op, algorithm: AllReduce) -> Operation:
        """x becomes the sum, mean or maximum."""
        operation = self.prepared.find(x, op, algorithm)
        if operation is None:
            buffer = self.buffer(x)
            operation = self._all_reduce(buffer, op, algorithm)
            if not isinstance(buffer, OnGpu):  # which is for one call: it knows where the caller's stream was
                self.prepared.keep(x, op, algorithm, operation)
        return operation

    def all_reduce_into(self, into: Tensor, x: Tensor) -> Operation:
        """`into` becomes the sum of x, converted once."""
        how = f"into {id(into)}"
        operation = self.prepared.find(x, "sum", how)
        if operation is None:
            target, buffer = self.buffer(into, reads=False), self.buffer(x)
            operation = replace(self._all_reduce_into(target, buffer), keeps=into)
            if not isinstance(buffer, OnGpu):
                self.prepared.keep(x, "sum", how, operation)
        return operation

    def buffer(self, x: Any, *, writable: bool = True, reads: bool = True) -> Buffer:
        """What messages of an array are made of, wherever it is: see `devices.buffer_of`."""
        return devices.buffer_of(x, self._transport, writable=writable, reads=reads)

    def reduce_scatter(self, x: Any, op: Op, sizes: Sequence[int] | None) -> Operation:
        """A shard of x becomes its sum."""
        buffer = self.buffer(x)
        buffer.require(op)
        bounds = self._bounds(buffer, sizes)
        if isinstance(buffer, OnGpu) and (on_gpu := self._memory.gpus.reduce_scatter(buffer, op, bounds)) is not None:
            return on_gpu
        column, place = self._memory.locate(buffer)
        detail = _where(buffer) | checksum([place, *bounds])
        call = Call(f"reduce_scatter({op})", buffer.dtype, buffer.size, detail)
        if column is not None and self._memory.only_host is not None:
            return Operation(call, begin=shared.reduce_scatter(self._memory.only_host, column, op, call, bounds))
        return Operation(call, send=lambda wire: ring.reduce_scatter(self._by_host(wire), buffer, op, bounds))

    def all_gather(self, x: Any, sizes: Sequence[int] | None) -> Operation:
        """x becomes all shards."""
        buffer = self.buffer(x)
        bounds = self._bounds(buffer, sizes)
        if isinstance(buffer, OnGpu) and (on_gpu := self._memory.gpus.all_gather(buffer, bounds)) is not None:
            return on_gpu
        column, place = self._memory.locate(buffer)
        call = Call("all_gather", buffer.dtype, buffer.size, _where(buffer) | checksum([place, *bounds]))
        if column is not None and self._memory.only_host is not None:
            return Operation(call, begin=shared.all_gather(self._memory.only_host, column, call, bounds))
        return Operation(call, send=lambda wire: ring.all_gather(self._by_host(wire), buffer, bounds))

    def all_to_all(
        self, out: Any, into: Any, out_sizes: Sequence[int] | None, into_sizes: Sequence[int] | None
    ) -> Operation:
        """`into` becomes what all have for this rank."""
        given, taken = self.buffer(out, writable=False), self.buffer(into, reads=False)
        if given.dtype != taken.dtype:
            raise MessageError(f"all_to_all from {given.dtype} into {taken.dtype}: both must have one dtype")
        if given.overlaps(taken):
            raise MessageError("all_to_all into the memory that it sends from: give two arrays")
        out_bounds = self._bounds(given, self._even(given) if out_sizes is None else out_sizes)
        into_bounds = self._bounds(taken, self._even(taken) if into_sizes is None else into_sizes)
        call = Call("all_to_all", given.dtype)
        return Operation(call, send=lambda wire: exchange.all_to_all(wire, given, taken, out_bounds, into_bounds))

    def broadcast(self, x: Any, root: int) -> Operation:
        """x becomes that of the root."""
        is_root = self._rank == p2p.check_peer(root, self._size)
        buffer = self.buffer(x, writable=not is_root, reads=is_root)
        if isinstance(buffer, OnGpu) and (on_gpu := self._memory.gpus.broadcast(buffer)) is not None:
            return on_gpu
        call = Call("broadcast", buffer.dtype, buffer.size, _where(buffer) | root)
        return Operation(call, send=lambda wire: ring.broadcast(self._by_host(wire), buffer, root))

    def barrier(self) -> Operation:
        """Nobody leaves before all have come."""
        call, host = Call("barrier"), self._memory.only_host
        if host is not None:
            return Operation(call, begin=lambda: shared.barrier(host, call))
        return Operation(call, send=p2p.barrier)

    def _all_reduce_into(self, into: Buffer, x: Buffer) -> Operation:
        if getattr(into, "gpu", None) is not getattr(x, "gpu", None):
            raise MessageError("all_reduce_into memory of another device: give two arrays on one GPU, or none on one")
        if isinstance(x, OnGpu) and isinstance(into, OnGpu) and self._wants in ("auto", "shared"):
            on_gpu = self._memory.gpus.all_reduce_into(into, x)
            if on_gpu is not None:
                return on_gpu
        column, place = self._memory.locate(x)
        targets, target_place = self._memory.locate(into)
        host = self._memory.only_host if self._wants in ("auto", "shared") else None
        if host is not None and column is not None and targets is not None:
            call = Call("all_reduce(sum)", x.dtype, x.size, checksum([place, target_place]))
            return Operation(call, begin=shared.all_reduce_into(host, column, targets, call))
        return self._all_reduce(x, "sum", "auto").followed_by(partial(into.convert, x))

    def _all_reduce(self, x: Buffer, op: Op, algorithm: AllReduce) -> Operation:
        x.require(op)
        asked = self._wants if algorithm == "auto" else algorithm
        if isinstance(x, OnGpu) and asked in ("auto", "shared"):
            on_gpu = self._memory.gpus.all_reduce(x, op)
            if on_gpu is not None:
                return on_gpu
        column, place = self._memory.locate(x)
        host = self._memory.host if isinstance(self._memory.host, Host) else None
        in_one_call = host is not None and self._compiled and can_sum_through_slots(host, x, op)
        chosen = self._select(algorithm, x, column, op, in_one_call=in_one_call)
        call = Call(f"all_reduce({op})", x.dtype, x.size, _where(x))
        there = replace(call, detail=place)  # in an arena
        if chosen == "shared":
            assert host is not None
            if column is not None and shared.pays_in_place(host, x, compiled=in_one_call):
                in_place = plan_sum_in_place(host, column, op, there)
                begin = in_place.whole if in_place else shared.all_reduce(host, column, op, there)
                return Operation(there, begin=begin, one_call=in_place)
            if in_one_call:
                passed = SumThroughSlots(host, x, call)
                return Operation(call, begin=passed.whole, one_call=passed if x.is_in_place else None)
            return Operation(call, begin=shared.all_reduce_through_slots(host, x, op, call))
        if chosen == "hierarchical":
            assert column is not None
            return Operation(
                there, send=lambda wire: hierarchical.all_reduce(wire, self._topology, host, column, op, there)
            )
        call = replace(call, detail=call.detail | ALGORITHM_BITS[chosen])
        if chosen == "mpi":
            return Operation(call, send=lambda wire: native.all_reduce(wire, x, op))
        return Operation(call, send=lambda wire: ring.all_reduce(self._by_host(wire), x, op))

    def _select(
        self, algorithm: AllReduce, x: Buffer, column: list[Buffer] | None, op: Op, *, in_one_call: bool
    ) -> AllReduce:
        """Which all-reduce, of those that can be used."""
        usable: set[AllReduce] = {"ring"}
        if self._memory.only_host is not None and not isinstance(x, OnGpu):
            usable.add("shared")
        if self._topology.num_hosts > 1 and column is not None:
            usable.add("hierarchical")
        if native.can_add(x, op):
            usable.add("mpi")
        return select(
            self._wants if algorithm == "auto" else algorithm,
            usable,
            num_hosts=self._topology.num_hosts,
            in_arena=column is not None,
            in_one_call=in_one_call,
            num_bytes=x.size * x.itemsize,
        )

    def _by_host(self, wire: Wire) -> Wire:
        """The wire in the order in which a ring enters and leaves each host once."""
        return wire.among(self._topology.by_host) if self._topology.num_hosts > 1 else wire

    def _bounds(self, x: Buffer, sizes: Sequence[int] | None) -> Sequence[int]:
        """Where the shards of x begin and end, [n + 1]."""
        if sizes is None:
            return chunk_bounds(x.size, self._size)
        bounds = [0, *accumulate(sizes)]
        if len(sizes) != self._size or min(sizes) < 0 or bounds[-1] != x.size:
            raise MessageError(
                f"sizes {list(sizes)} of {len(sizes)} shards do not cut {x.size:,} elements for {self._size} ranks: "
                "give one size a rank, which add up to the array's"
            )
        return bounds

    def _even(self, x: Buffer) -> Sequence[int]:
        """Equal sizes of parts, one a rank."""
        if x.size % self._size:
            raise MessageError(f"{x.size:,} elements cannot be cut into {self._size} equal parts: give their sizes")
        return [x.size // self._size] * self._size


def _where(x: Buffer) -> int:
    """For `Call.detail`: the ranks' arrays are on GPUs, or all in memory of hosts."""
    return ON_GPU if isinstance(x, OnGpu) else 0
