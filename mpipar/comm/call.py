"""What a rank called, in two words, so that ranks can compare it for next to nothing.

Ranks that call different operations, or one with different sizes or dtypes, would wait for ever or add up what does
not belong together. On one host, ranks compare the words of every collective where they meet. Between hosts, a rank
sends its words to its right neighbour and compares those of its left one: in the first collectives of a communicator,
in which mistakes in a program show, and in a sample of the later ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np

from mpipar.comm.buffers import MOVABLE, Buffer
from mpipar.comm.p2p import Wire
from mpipar.comm.pending import Algorithm
from mpipar.errors import MessageError

KINDS = (
    "all_reduce(sum)",
    "all_reduce(mean)",
    "all_reduce(max)",
    "reduce_scatter(sum)",
    "reduce_scatter(mean)",
    "reduce_scatter(max)",
    "all_gather",
    "all_to_all",
    "broadcast",
    "barrier",
)
ON_GPU = 1 << 62
"""In the detail: the array is on a GPU."""
ALGORITHM_BITS = {"ring": 1 << 60, "mpi": 1 << 61}
"""In the detail of an all-reduce: which algorithm, of those that send messages from rank to rank."""

_SIZE_BITS = 50
_DTYPE_BITS = 5

# Collectives of a communicator whose words are compared over messages.
_FIRST = 64
_EVERY = 64


@dataclass(frozen=True)
class Call:
    """One rank's call of a collective.

    Args:
        kind: One of `KINDS`.
        dtype: Of its array.
        size: Elements of its array.
        detail: What else must agree: that the array is on a GPU, where it lies in shared memory, the algorithm of an
            all-reduce, the root of a broadcast, a checksum of where shards begin and end.
    """

    kind: str
    dtype: str = "uint8"
    size: int = 0
    detail: int = 0

    @cached_property
    def word(self) -> int:
        """All but the detail, in 64 bits."""
        kind, dtype = _KIND_NUMBERS[self.kind], _DTYPE_NUMBERS[self.dtype]
        return ((kind << _DTYPE_BITS) + dtype << _SIZE_BITS) + self.size

    @classmethod
    def of_words(cls, word: int, detail: int) -> Call:
        """The call of these words."""
        numbers, size = word >> _SIZE_BITS, word % (1 << _SIZE_BITS)
        return cls(KINDS[numbers >> _DTYPE_BITS], MOVABLE[numbers % (1 << _DTYPE_BITS)], size, detail)

    def __str__(self) -> str:
        if self.kind == "barrier":
            return self.kind
        if self.kind == "all_to_all":  # each rank with sizes of its own
            return f"{self.kind} of {self.dtype}"
        root = f" from rank {self.detail & ~ON_GPU}" if self.kind == "broadcast" else ""
        return f"{self.kind}{root} of {self.size:,} {self.dtype}"


_KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(MOVABLE)}


def checksum(numbers: Sequence[int]) -> int:
    """Of places and bounds, for `Call.detail`."""
    return crc32(np.array(numbers, np.int64).tobytes())


def mismatch(mine: Call, peer: int, theirs: Call) -> MessageError:
    """The error of ranks that called different things."""
    if mine.word == theirs.word and (mine.detail ^ theirs.detail) & ON_GPU:
        where = "on a GPU" if theirs.detail & ON_GPU else "in the host's memory"
        return MessageError(f"the array of rank {peer} is {where}, this rank's is not: give all on GPUs, or none")
    if mine.word == theirs.word and (mine.detail ^ theirs.detail) & sum(ALGORITHM_BITS.values()):
        return MessageError(
            f"rank {peer} reduces by another algorithm: give the same to all_reduce on all ranks, and arrays that are "
            "all at one place of one arena, or none in it"
        )
    if mine.word == theirs.word and mine.kind.startswith("all_reduce"):
        return MessageError(
            f"the array of rank {peer} lies elsewhere: give all at one place of one arena, or none in it"
        )
    if mine.word == theirs.word and mine.kind != "broadcast":
        return MessageError(
            f"rank {peer} gave other sizes of shards, or its array lies elsewhere: give the same sizes on all ranks, "
            "and arrays at one place of one arena, or none in it"
        )
    return MessageError(f"rank {peer} called {theirs}, this rank {mine}: all ranks must make the same call")


def is_compared(sequence: int) -> bool:
    """Whether the communicator's `sequence`-th collective compares words in messages."""
    return sequence <= _FIRST or sequence % _EVERY == 0


def compared(wire: Wire, call: Call, algorithm: Algorithm) -> Algorithm:
    """The algorithm, after a comparison with the left neighbour on the wire."""
    if wire.size > 1:
        theirs = np.zeros(2, np.uint64)
        left = (wire.rank - 1) % wire.size
        incoming = wire.receive(Buffer(theirs), 0, 2, left)
        outgoing = wire.send(
            Buffer(np.array([call.word, call.detail], np.uint64)), 0, 2, (wire.rank + 1) % wire.size, counted=False
        )
        yield incoming
        yield outgoing
        if theirs[0] != call.word or theirs[1] != call.detail:
            raise mismatch(call, wire.members[left], Call.of_words(int(theirs[0]), int(theirs[1])))
    yield from algorithm
