"""What a call of a collective comes to for arrays on GPUs, in the memory that the ranks of the host have open."""

from __future__ import annotations

from collections.abc import Sequence

from mpipar.comm.buffers import Op
from mpipar.comm.call import Call, checksum
from mpipar.comm.device import collectives
from mpipar.comm.device.arena import DeviceArena, Place
from mpipar.comm.device.gpu import Caller
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
    """

    def __init__(self, arenas: list[tuple[int, DeviceArena]]):
        self._arenas = arenas

    def all_reduce(self, host: Host, x: OnGpu, op: Op) -> Operation | None:
        """x becomes the sum, mean or maximum."""
        call = Call(f"all_reduce({op})", x.dtype, x.size)
        arena, place, number = self._locate(x)
        small = x.size * x.itemsize <= collectives.THROUGH_SLOTS_BYTES
        if arena is not None and place is not None and not small:
            there = Call(call.kind, x.dtype, x.size, number)
            return _operation(there, collectives.all_reduce(host, arena, place, op, there, x.caller))
        of_gpu = next((arena for _, arena in self._arenas if arena.gpu is x.gpu), None)
        if of_gpu is None:
            return None
        shape = Place(0, x.size, x.dtype, x.itemsize)
        steps = collectives.all_reduce_through_slots(host, of_gpu, x.address, shape, op, call, x.caller)
        return _operation(call, _then_put_back(steps, x))

    def all_reduce_into(self, host: Host, into: OnGpu, x: OnGpu) -> Operation | None:
        """`into` becomes the sum of x, converted once."""
        arena, place, number = self._locate(x)
        other, target, target_number = self._locate(into)
        if arena is None or arena is not other or place is None or target is None or x.dtype != "float64":
            return None
        call = Call("all_reduce(sum)", x.dtype, x.size, checksum([number, target_number]))
        return _operation(call, collectives.all_reduce_into(host, arena, place, target, call, x.caller))

    def reduce_scatter(self, host: Host, x: OnGpu, op: Op, bounds: Sequence[int]) -> Operation | None:
        """A shard of x becomes its sum."""
        arena, place, number = self._locate(x)
        if arena is None or place is None:
            return None
        call = Call(f"reduce_scatter({op})", x.dtype, x.size, checksum([number, *bounds]))
        return _operation(call, collectives.reduce_scatter(host, arena, place, op, call, bounds, x.caller))

    def all_gather(self, host: Host, x: OnGpu, bounds: Sequence[int]) -> Operation | None:
        """x becomes all shards."""
        arena, place, number = self._locate(x)
        if arena is None or place is None:
            return None
        call = Call("all_gather", x.dtype, x.size, checksum([number, *bounds]))
        return _operation(call, collectives.all_gather(host, arena, place, call, bounds, x.caller))

    def _locate(self, x: OnGpu) -> tuple[DeviceArena | None, Place | None, int]:
        """(arena, place in it, number of the place to be compared between ranks), if x is in one."""
        if x.is_contiguous:
            for number, arena in self._arenas:
                offset = arena.offset(x.address, x.size * x.itemsize)
                if offset is not None:
                    return arena, Place(offset, x.size, x.dtype, x.itemsize), 1 + offset + (number << 48)
        return None, None, 0


def alone(call: Call, x: OnGpu) -> Operation:
    """Of one rank: x is its own sum."""
    return _operation(call, _nothing(x.caller))


def _nothing(caller: Caller) -> Algorithm:
    caller.before()
    return
    yield


def _operation(call: Call, steps: Algorithm) -> Operation:
    return Operation(call, begin=lambda: steps)


def _then_put_back(steps: Algorithm, x: OnGpu) -> Algorithm:
    yield from steps
    x.put_back()
