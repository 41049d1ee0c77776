"""What the processes of a stand-in know of each other's devices: events, allocations, and every access to memory.

It lies in memory that they share. Each process writes its own part only; all read all of it.

Order between accesses is kept in vector clocks: of every stream a counter of what it was given, and with it the highest
counters of all other streams that are certain to be done before. An event carries the clock of its stream, and hands it
to the streams that wait for it. Two accesses to the same memory, one of them writing, of which neither is certain to be
done before the other are a missing wait, whether or not it showed.

Lamport, "Time, clocks, and the ordering of events in a distributed system", 1978; Mattern, "Virtual time and global
states of distributed systems", 1989.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

PROCESSES = 4
STREAMS = 6
EVENTS = 64
ALLOCATIONS = 256
ACCESSES = 6000

Clock = npt.NDArray[np.int64]  # [PROCESSES, STREAMS]

_EVENT = np.dtype([("live", "i8"), ("recorded", "i8"), ("done", "i8"), ("wanted", "i8"), ("clock", "i8", 24)])
_ALLOCATION = np.dtype([("live", "i8"), ("num_bytes", "i8"), ("opened", "i8", PROCESSES)])
_ACCESS = np.dtype(
    [
        ("owner", "i8"),
        ("number", "i8"),
        ("start", "i8"),
        ("stop", "i8"),
        ("writes", "i8"),
        ("stream", "i8"),
        ("count", "i8"),
        ("clock", "i8", 24),
    ]
)
_PART = np.dtype(
    [
        ("events", _EVENT, EVENTS),
        ("allocations", _ALLOCATION, ALLOCATIONS),
        ("num_accesses", "i8"),
        ("accesses", _ACCESS, ACCESSES),
    ]
)
BOARD_BYTES = PROCESSES * _PART.itemsize


class Misuse(AssertionError):
    """What a device would let pass, or crash of."""


class Span(NamedTuple):
    """Bytes [start, stop) of an allocation."""

    owner: int  # process
    number: int
    start: int
    stop: int


class Board:
    """The shared memory, as one process sees it.

    Args:
        memory: `BOARD_BYTES` of zeros.
        process: Which of them this one is.
    """

    def __init__(self, memory: mmap.mmap | bytearray, process: int):
        self.parts = np.frombuffer(memory, _PART)
        self.process = process
        self.own = self.parts[process]

    def access(self, span: Span, *, writes: bool, stream: int, count: int, clock: Clock) -> None:
        """Notes an access that this process gives to one of its streams.

        Raises:
            Misuse: It may happen at the same time as another one, and one of them writes.
        """
        if not self.parts[span.owner]["allocations"][span.number]["live"]:
            raise Misuse(f"{span} is used after it was freed")
        index = int(self.own["num_accesses"])
        if index == ACCESSES:
            raise RuntimeError("the stand-in has no room for more accesses")
        entry = self.own["accesses"][index]
        entry["owner"], entry["number"], entry["start"], entry["stop"] = span
        entry["writes"], entry["stream"], entry["count"] = writes, stream, count
        entry["clock"] = clock.ravel()
        self.own["num_accesses"] = index + 1  # then look: whoever is second sees the other
        for process, part in enumerate(self.parts):
            others = part["accesses"][: int(part["num_accesses"])]
            near = others[
                (others["owner"] == span.owner)
                & (others["number"] == span.number)
                & (others["start"] < span.stop)
                & (others["stop"] > span.start)
                & ((others["writes"] == 1) | writes)
            ]
            for other in near:
                if process == self.process and other["stream"] == stream:
                    continue
                before = clock[process, other["stream"]] >= other["count"]
                after = other["clock"].reshape(PROCESSES, STREAMS)[self.process, stream] >= count
                if not before and not after:
                    raise Misuse(
                        f"missing wait: stream {stream} of process {self.process} "
                        f"{'writes' if writes else 'reads'} {span}, and stream {other['stream']} of process {process} "
                        f"{'writes' if other['writes'] else 'reads'} bytes [{other['start']}, {other['stop']}) of it"
                    )
