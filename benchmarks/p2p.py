"""Question: how fast is a message from a rank to its neighbour?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from torch import Tensor

from benchmarks import gloo, mpi_peer, patterns
from benchmarks.case import Case, Contestant
from benchmarks.limits import Copy, Place
from benchmarks.sweep import Sweep
from mpipar.comm.mpi import MPI

_WINDOW = 16  # messages of a stream that are under way together


class Post(NamedTuple):
    """A library's messages to and from the partner of this rank.

    Args:
        message: Makes of an array what the others take.
        send: Sends.
        receive: Receives.
        start_send: Posts a sending, and returns what can be waited for.
        start_receive: Posts a receiving.
        wait: Waits for either.
    """

    message: Callable[[Tensor], Any]
    send: Callable[[Any], object]
    receive: Callable[[Any], object]
    start_send: Callable[[Any], Any]
    start_receive: Callable[[Any], Any]
    wait: Callable[[Any], object]


@dataclass(frozen=True, kw_only=True)
class PointToPoint(Sweep):
    """Times messages of mpipar, MPI and gloo between ranks 0 and 1, 2 and 3, and so on, all pairs at once.

    Contestants: mpipar, mpi, gloo. Time is that of one message.
    """

    pattern: Literal["pingpong", "stream"] = "pingpong"
    """There and back, one message at a time; or 16 at a time in one direction, and an answer of one element."""

    question = "p2p"
    redop = "none"
    num_arrays = 2

    @property
    def osu_test(self) -> str:
        return "Latency Test" if self.pattern == "pingpong" else "Bandwidth Test"

    def contestants(self, case: Case) -> Mapping[str, Contestant | str]:
        partner, comm, world = case.world.rank ^ 1, MPI.COMM_WORLD, case.world
        ours = Post(
            lambda x: x,
            lambda x: world.send(x, partner),
            lambda x: world.receive(x, partner),
            lambda x: world.start_send(x, partner),
            lambda x: world.start_receive(x, partner),
            lambda work: work.wait(),
        )
        mpi = Post(
            mpi_peer.movable,
            lambda x: comm.Send(x, partner),
            lambda x: comm.Recv(x, partner),
            lambda x: comm.Isend(x, partner),
            lambda x: comm.Irecv(x, partner),
            lambda request: request.Wait(),
        )
        of_torch = Post(
            lambda x: x,
            lambda x: dist.send(x, partner),
            lambda x: dist.recv(x, partner),
            lambda x: dist.isend(x, partner),
            lambda x: dist.irecv(x, partner),
            lambda work: work.wait(),
        )
        return {
            "mpipar": self._contestant(case, "mpipar", ours, ours=True),
            "mpi": self._contestant(case, mpi_peer.title("Send" if self.pattern == "pingpong" else "Isend"), mpi),
            "gloo": self._contestant(case, gloo.TITLE, of_torch),
        }

    def given(self, case: Case) -> Tensor:
        return patterns.numbers(case.elements, case.dtype, start=case.world.rank)

    def wanted(self, case: Case) -> Tensor:
        return patterns.numbers(case.elements, case.dtype, start=case.world.rank ^ 1)

    def bus_factor(self, num_ranks: int) -> float:
        return 1.0

    def count(self, elements: int, num_ranks: int) -> int:
        return elements

    def copies(self, num_ranks: int, rank: int, num_bytes: int) -> list[Copy]:
        # A message is read in the sender's memory, and written in the receiver's.
        return [Copy(Place(rank - 1, 0), Place(rank, 0, array=1), num_bytes)] if rank % 2 else []

    def bytes_leaving(self, host_of: Sequence[int], num_bytes: int) -> float:
        crossing = [pair for pair in zip(host_of[::2], host_of[1::2], strict=False) if pair[0] != pair[1]]
        return num_bytes * max(Counter(host for pair in crossing for host in pair).values(), default=0)

    def _contestant(self, case: Case, title: str, post: Post, *, ours: bool = False) -> Contestant:
        source, result, answer, rank = case.private(), case.private(), case.private(1), case.world.rank
        sends_first = rank % 2 == 0
        gets_nothing = sends_first and self.pattern == "stream"
        messages = (post.message(source), post.message(result), post.message(answer))
        if rank ^ 1 >= case.world.size:  # the last of an odd number has nobody
            gets_nothing, call = True, _idle
        elif self.pattern == "pingpong":
            call = _pingpong(post, *messages[:2], sends_first)
        else:
            call = _stream(post, *messages, sends_first)
        return Contestant(
            title=title,
            source=source,
            result=result[:0] if gets_nothing else result,
            calls={self.pattern: call},
            ours=ours,
            operations=2 if self.pattern == "pingpong" else _WINDOW,
        )


def _idle() -> None:
    pass


def _pingpong(post: Post, source: Any, result: Any, sends_first: bool) -> Callable[[], None]:
    def run() -> None:
        if sends_first:
            post.send(source)
            post.receive(result)
        else:
            post.receive(result)
            post.send(source)

    return run


def _stream(post: Post, source: Any, result: Any, answer: Any, sends: bool) -> Callable[[], None]:
    def run() -> None:
        # All messages arrive in the same memory, as in osu_bw: they are the same.
        works = [post.start_send(source) if sends else post.start_receive(result) for _ in range(_WINDOW)]
        for work in works:
            post.wait(work)
        if sends:
            post.receive(answer)
        else:
            post.send(answer)

    return run
