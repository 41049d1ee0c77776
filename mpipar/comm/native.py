"""MPI's own all-reduce: for small messages between hosts, for comparison, and where nothing of ours applies."""

from __future__ import annotations

from mpipar.comm.buffers import Buffer, Op
from mpipar.comm.mpi import MPI
from mpipar.comm.p2p import Wire
from mpipar.comm.pending import Algorithm, Message

_TYPES = {
    "float32": MPI.FLOAT,
    "float64": MPI.DOUBLE,
    "int8": MPI.INT8_T,
    "int16": MPI.INT16_T,
    "int32": MPI.INT32_T,
    "int64": MPI.INT64_T,
    "uint8": MPI.UINT8_T,
    "uint16": MPI.UINT16_T,
    "uint32": MPI.UINT32_T,
    "uint64": MPI.UINT64_T,
}
_LARGEST_COUNT = 2**31 - 1


def can_add(x: Buffer, op: Op) -> bool:
    """Whether MPI can do what the other algorithms do.

    It has no portable 16-bit floats, its maximum may lose a NaN, and it adds with the processor.
    """
    loses_nan = op == "max" and x.dtype.startswith("float")
    return x.dtype in _TYPES and not loses_nan and x.size <= _LARGEST_COUNT and x.is_in_host_memory


def all_reduce(wire: Wire, x: Buffer, op: Op) -> Algorithm:
    """Every rank's x becomes the sum (mean, maximum) over all ranks, as MPI_Iallreduce does it."""
    yield from x.coming(0, x.size)
    message, _ = x.message(0, x.size)
    how = MPI.MAX if op == "max" else MPI.SUM
    request = wire.comm.Iallreduce(MPI.IN_PLACE, [message, x.size, _TYPES[x.dtype]], how)
    yield Message(request, None, receiving=False, num_bytes=x.size * x.itemsize)
    if op == "mean":
        x.scale(0, x.size, 1 / wire.size)
    x.commit()
