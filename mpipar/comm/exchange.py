"""All-to-all: every rank has a part for every other.

In round t a rank sends to the rank t to its right and receives from the rank t to its left, so that in every round each
rank has one message in and one out. A few rounds are under way at a time.

Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing systems", 1997, has the
pairwise exchange and what is faster for tiny messages.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpipar.comm.buffers import Buffer
from mpipar.comm.p2p import LARGEST_MESSAGE_BYTES, Wire, segments
from mpipar.comm.pending import Algorithm, Message

_ROUNDS_AHEAD = 4


def all_to_all(
    wire: Wire, out: Buffer, into: Buffer, out_bounds: Sequence[int], into_bounds: Sequence[int]
) -> Algorithm:
    """Part i of `out` goes to rank i, where it is part r of `into`. Bytes sent by a rank: `out` less its own part.

    Args:
        wire: Through all ranks, in their order.
        out: What this rank has for the others.
        into: What it gets; other memory than `out`.
        out_bounds: [n + 1] where the parts of `out` begin and end.
        into_bounds: The same of `into`.
    """
    n, r = wire.size, wire.rank
    yield from out.coming(0, out.size)
    yield from into.coming(0, into.size)
    elements = LARGEST_MESSAGE_BYTES // out.itemsize
    rounds: list[list[Message]] = []
    for t in range(1, n):
        to, source = (r + t) % n, (r - t) % n
        incoming = [wire.receive(into, a, b, source) for a, b in _pieces(into_bounds, source, elements)]
        outgoing = [wire.send(out, a, b, to) for a, b in _pieces(out_bounds, to, elements)]
        rounds.append(incoming + outgoing)
        if t > _ROUNDS_AHEAD:
            yield from rounds[t - 1 - _ROUNDS_AHEAD]
    into.replace(into_bounds[r], into_bounds[r + 1], out, out_bounds[r])
    for messages in rounds[-_ROUNDS_AHEAD:]:
        yield from messages
    into.commit()


def _pieces(bounds: Sequence[int], rank: int, elements: int) -> list[tuple[int, int]]:
    """The messages of one part. An empty part is one empty message: ranks that disagree on sizes then notice."""
    a, b = bounds[rank], bounds[rank + 1]
    return list(segments(a, b, elements)) or [(a, a)]
