"""What a call of a collective comes to for arrays on GPUs, in the memory that the ranks of the host have open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mpipar.comm.buffers import Op
from mpipar.comm.call import ON_GPU, Call, checksum
from mpipar.comm.device import collectives
from mpipar.comm.device.arena import DeviceArena, Place
from mpipar.comm.device.on_gpu import OnGpu
from mpipar.comm.host import Host
from mpipar.comm.pending import Algorithm
from mpipar.comm.prepared import Operation


class GpuOperations:
    """The collectives of the ranks of one host on their GPUs.

    Each takes what is on a GPU and returns the operation, or None if that array has to go through messages. They are
    made for one call: they begin where the caller's stream was.

    Args:
        arenas: Those of the communicator, with their numbers.
        alone: Whether there is but one rank.

    Attributes:
        host: Where all ranks meet, if they are on one.
    """

    def __init__(self, arenas: list[tuple[int, DeviceArena]], *, alone: bool):
        self.host: Host | None = None
        self._arenas = arenas
        self._alone = alone

    def all_reduce(self, x: OnGpu, op: Op) -> Operation | None:
        """x becomes the sum, mean or maximum."""
        call = Call(f"all_reduce({op})", x.dtype, x.size, ON_GPU)
        if self._alone:
            return _nothing_to_do(call, x)
        if self.host is None:
            return None
        arena, place, number = self._locate(x)
        small = x.size * x.itemsize <= collectives.THROUGH_SLOTS_BYTES
        if arena is not None and place is not None and not small:
            there = replace(call, detail=ON_GPU | number)
            return _operation(there, collectives.all_reduce(self.host, arena, place, op, there, x.caller))
        index, of_gpu = next(((index, arena) for index, arena in self._arenas if arena.gpu is x.gpu), (0, None))
        if of_gpu is None:
            return None
        call = replace(call, detail=ON_GPU | index << 48)  # a rank with several GPUs has slots on each
        shape = Place(0, x.size, x.dtype, x.itemsize)
        steps = collectives.all_reduce_through_slots(self.host, of_gpu, x.address, shape, op, call, x.caller)
        return _operation(call, steps).followed_by(x.put_back)

    def all_reduce_into(self, into: OnGpu, x: OnGpu) -> Operation | None:
        """`into` becomes the sum of x, converted once."""
        arena, place, number = self._locate(x)
        other, target, target_number = self._locate(into)
        operation: Operation | None
        if (
            self.host is not None
            and arena is not None
            and arena is other
            and place is not None
            and target is not None
            and x.dtype == "float64"
        ):
            call = Call("all_reduce(sum)", x.dtype, x.size, ON_GPU | checksum([number, target_number]))
            steps = collectives.all_reduce_into(self.host, arena, place, target, call, x.caller)
            operation = _operation(call, steps)
        else:
            operation = self.all_reduce(x, "sum")
            operation = operation and operation.followed_by(partial(into.copy_from, x))
        if operation is not None:
            into.caller.before()  # x was called with on the same stream, and later
        return operation

    def reduce_scatter(self, x: OnGpu, op: Op, bounds: Sequence[int]) -> Operation | None:
        """A shard of x becomes its sum."""
        arena, place, number = self._locate(x)
        call = Call(f"reduce_scatter({op})", x.dtype, x.size, ON_GPU | checksum([number, *bounds]))
        if self._alone:
            return _nothing_to_do(call, x)
        if arena is None or place is None or self.host is None:
            return None
        return _operation(call, collectives.reduce_scatter(self.host, arena, place, op, call, bounds, x.caller))

    def all_gather(self, x: OnGpu, bounds: Sequence[int]) -> Operation | None:
        """x becomes all shards."""
        arena, place, number = self._locate(x)
        call = Call("all_gather", x.dtype, x.size, ON_GPU | checksum([number, *bounds]))
        if self._alone:
            return _nothing_to_do(call, x)
        if arena is None or place is None or self.host is None:
            return None
        return _operation(call, collectives.all_gather(self.host, arena, place, call, bounds, x.caller))

    def broadcast(self, x: OnGpu) -> Operation | None:
        """x becomes that of the root: of one rank it is that."""
        return _nothing_to_do(Call("broadcast", x.dtype, x.size), x) if self._alone else None

    def _locate(self, x: OnGpu) -> tuple[DeviceArena | None, Place | None, int]:
        """(arena, place in it, number of the place to be compared between ranks), if x is in one."""
        if x.is_contiguous:
            for number, arena in self._arenas:
                offset = arena.offset(x.address, x.size * x.itemsize)
                if offset is not None:
                    return arena, Place(offset, x.size, x.dtype, x.itemsize), 1 + offset + (number << 48)
        return None, None, 0


def _nothing_to_do(call: Call, x: OnGpu) -> Operation:
    """Of one rank: x is its own sum."""
    x.caller.before()
    return _operation(call, iter(()))


def _operation(call: Call, steps: Algorithm) -> Operation:
    return Operation(call, begin=lambda: steps)
