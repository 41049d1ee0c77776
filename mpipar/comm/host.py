"""The ranks of a communicator on this host: where they meet, and memory to pass things in.

They meet at flags in shared memory: each rank counts its meetings in a word of its own, and waits until the words of
the others have come as far. That takes a microsecond, where empty messages take ten. Nobody spins on a flag alone: the
wait is one of those of `progress`, which also moves messages, hands the core to others, looks at the clock, and
notices the death of a rank.

Beside its flag a rank writes what it has come for (`call`), and those that meet compare.

    line of a rank     | meetings | word, detail of even meetings | word, detail of odd ones | turn |

A rank can be one meeting ahead of its neighbours, not two; hence two places for what it came for, and two slots of
memory for what it brings, of which its turn says which it has used last.

A flag stands for what was written before it. x86 makes stores visible in their order; other processors do not, and
Python has no fence for them. There the ranks meet in empty messages, and MPI has the fences.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable

from mpipar.comm.arena import Arena
from mpipar.comm.buffers import Buffer
from mpipar.comm.call import Call, compared, mismatch
from mpipar.comm.mpi import MPI
from mpipar.comm.p2p import MEETING_TAG, Account, Wire, barrier
from mpipar.comm.pending import Pending

SLOT_BYTES = 512 << 10

_PAGE_BYTES = 4096
HOST_BYTES = _PAGE_BYTES + 2 * SLOT_BYTES
"""Of the memory that they share, for each rank."""

_SPINS = 50  # about a microsecond
_SPINS_WHERE_CROWDED = 2  # a neighbour on the same core cannot come meanwhile

_LINE_WORDS = 6
_MEETINGS, _TURN = 0, 5  # and the calls between


class Host:
    """This host's ranks of one communicator.

    Args:
        ranks: Their numbers in the communicator, ascending.
        rank: Which of them this process is, from 0.
        memory: What they share.
        wire: Between them, to meet in messages; None to meet at flags.
        crowded: Whether there are fewer cores than ranks.

    Attributes:
        spins: How often a rank looks for another before it gives its core away, for what is compiled.
    """

    def __init__(self, ranks: tuple[int, ...], rank: int, memory: Arena, wire: Wire | None, *, crowded: bool):
        self.ranks = ranks
        self.rank = rank
        self.size = len(ranks)
        self.spins = _SPINS_WHERE_CROWDED if crowded else _SPINS
        self._memory = memory
        self._wire = wire
        self._lines = memory.words_at(0, _LINE_WORDS)
        self._own = self._lines[rank]
        self._others = [(line, peer) for line, peer in zip(self._lines, ranks, strict=True) if line is not self._own]
        self._slots: dict[str, tuple[list[Buffer], list[Buffer]]] = {}

    @property
    def meets_at_flags(self) -> bool:
        """And not in messages."""
        return self._wire is None

    def addresses_of_lines(self) -> list[int]:
        """Of each rank, for what is compiled."""
        return [line.address for line in self._memory.column_at(0, _LINE_WORDS, "uint64")]

    def meet(self, call: Call | None = None) -> Iterable[Pending]:
        """Nobody leaves before all have come, and what each wrote before is there for the others to read.

        The rank enters with this call: it is for algorithms that have begun, not for those that wait in a lane.

        Args:
            call: What this rank has come for. All give one, or none does.

        Returns:
            What to wait for.
        """
        if self._wire is not None:
            steps = barrier(self._wire)
            return steps if call is None else compared(self._wire, call, steps)
        own = self._own
        meetings = own[_MEETINGS] + 1
        if call is not None:
            place = _place(meetings)
            own[place] = call.word
            own[place + 1] = call.detail
        own[_MEETINGS] = meetings  # after all that was written before
        return self.arrivals(call)

    def arrivals(self, call: Call | None) -> Iterable[Pending]:
        """Of the others, at the meeting that this rank has last come to, at flags."""
        meetings = self._own[_MEETINGS]
        return [Arrival(line, peer, meetings, call) for line, peer in self._others]

    def take_turn(self) -> int:
        """Whose turn it is of the two slots of a rank.

        The slot is this rank's to fill until it goes to the next meeting, and everybody's to read from then on, until
        they go to the meeting after that. Of what they do not read it can be filled later, before a second meeting.
        """
        self._own[_TURN] ^= 1
        return self._own[_TURN]

    def slots(self, dtype: str, turn: int) -> list[Buffer]:
        """Memory for what each rank brings, by rank: `SLOT_BYTES`."""
        if dtype not in self._slots:
            itemsize = Buffer.itemsize_of(dtype)
            first, second = (
                self._memory.column_at(_PAGE_BYTES + turn * SLOT_BYTES, SLOT_BYTES // itemsize, dtype)
                for turn in (0, 1)
            )
            self._slots[dtype] = first, second
        return self._slots[dtype][turn]


class Arrival(Pending):
    """A neighbour that is on its way to a meeting."""

    __slots__ = ("_call", "_line", "_meetings", "_peer")

    def __init__(self, line: memoryview, peer: int, meetings: int, call: Call | None):
        self._line = line
        self._peer = peer
        self._meetings = meetings
        self._call = call

    def through(self) -> bool:
        """Whether it is there.

        Raises:
            MessageError: It has come for something else.
        """
        line = self._line
        if line[_MEETINGS] < self._meetings:
            return False
        call = self._call
        if call is not None:
            place = _place(self._meetings)
            if line[place] != call.word or line[place + 1] != call.detail:
                raise mismatch(call, self._peer, Call.of_words(line[place], line[place + 1]))
        return True


def _place(meetings: int) -> int:
    """Where in its line a rank writes what it has come for."""
    return 1 + 2 * (meetings & 1)


def open_host(comm: MPI.Comm, memory: Arena, ranks: tuple[int, ...], *, crowded: bool) -> Host | str:
    """Where the ranks of a host meet, or why they cannot.

    Args:
        comm: The communicator.
        memory: What they share: `HOST_BYTES` of zeros.
        ranks: Their numbers in the communicator, ascending.
        crowded: Whether there are fewer cores than ranks.
    """
    if len(ranks) == 1:
        return "there is one rank on the host"
    in_order = platform.machine() in ("x86_64", "AMD64")
    wire = None if in_order else Wire(comm, MEETING_TAG, Account(), ranks)
    return Host(ranks, ranks.index(comm.rank), memory, wire, crowded=crowded)
