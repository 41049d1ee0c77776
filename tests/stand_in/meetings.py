"""What hosts know of each other's devices because they have met.

A host that has seen an event reached knows that what lies before it is done. Those that it meets afterwards know it
too, and what they give their streams from then on comes behind it. Each writes what it knows beside its flag before it
comes to a meeting, and reads what the others wrote when it leaves. A note has two places, taken in turn, for a rank can
be one meeting ahead, and what it has learned since is not yet the others' to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mpipar.comm.call import Call
from mpipar.comm.host import Host
from mpipar.comm.pending import Pending
from tests.stand_in.board import PROCESSES, STREAMS, Clock

_BESIDE_THE_FLAG = 2048  # bytes from the beginning of a rank's page, of which its line is the first few
_WORDS = PROCESSES * STREAMS

Meet = Callable[[Host, Call | None], Iterable[Pending]]


def telling(meet: Meet, known: Clock) -> Meet:
    """`Host.meet`, in which the hosts tell each other what they know.

    Args:
        meet: The method itself.
        known: By this process's host, now and later.
    """

    def met(host: Host, call: Call | None = None) -> Iterable[Pending]:
        notes = [np.frombuffer(line, np.int64) for line in host._memory.words_at(_BESIDE_THE_FLAG, 1 + 2 * _WORDS)]
        mine = notes[host.rank]
        mine[0] += 1
        place = slice(1 + _WORDS * (int(mine[0]) & 1), 1 + _WORDS * ((int(mine[0]) & 1) + 1))
        mine[place] = known.ravel()
        return _leaving(meet(host, call), [note[place] for note in notes], known)

    return met


def _leaving(meeting: Iterable[Pending], notes: list[Clock], known: Clock) -> Iterator[Pending]:
    yield from meeting
    for note in notes:
        np.maximum(known, note.reshape(PROCESSES, STREAMS), out=known)
