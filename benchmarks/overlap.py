"""Question: how much of an all-reduce hides behind computation?

Computation is matrix products in slices, and after each the communication is moved along, as hooks do in backward. For
each size and contestant three things are timed: the computation, the all-reduce, and both, begun together.

    overlap %    (compute + all-reduce - both) / the shorter of compute and all-reduce; the median over rounds

100 is as if the shorter one were free; 0 is one after the other. The computation is made about as long as the slowest
contestant's all-reduce, and is the same for all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import gloo, mpi_peer, patterns
from benchmarks.case import Case
from benchmarks.gloo import start_gloo, stop_gloo
from benchmarks.machine import begin, comments
from benchmarks.measure import take_turns
from benchmarks.options import SizeOptions, present
from mpipar.comm import Communicator, Mesh, agreement
from mpipar.comm.mpi import MPI
from mpipar.comm.select import AllReduce as Algorithm

_WIDTH = 256  # of the matrices: a slice takes a millisecond or less


@dataclass(frozen=True)
class Entrant:
    """An all-reduce that can be begun, moved along, and waited for.

    Args:
        title: For people.
        x: What is reduced.
        start: Begins it.
        poll: Moves along what `start` returned; called after each slice of computation.
        wait: Ends it.
    """

    title: str
    x: Tensor
    start: Callable[[], Any]
    poll: Callable[[Any], object]
    wait: Callable[[Any], object]


@dataclass(frozen=True)
class Row:
    """Of one contestant and size. Times are microseconds, medians over rounds of the slowest rank."""

    contestant: str
    size: int
    time_us: float  # both together
    compute_us: float
    all_reduce_us: float
    overlap_percent: float
    wrong: int


@dataclass(frozen=True, kw_only=True)
class Overlap(SizeOptions):
    """Times an all-reduce of float32 with computation beside it: mpipar's, MPI_Iallreduce and gloo's.

    Contestants: arena (in shared memory), private (in ordinary memory, by whatever mpipar chooses), ring, mpi, gloo.
    """

    min_bytes: int = 1 << 20
    """Smallest array, in bytes; each is rounded to an equal number of elements for every rank."""
    format: Literal["osu", "json"] = "osu"
    """Tables as osu_iallreduce prints them, or one JSON document."""

    def run(self, world: Communicator) -> None:
        """Measures and prints. Collective."""
        with agreement(world):
            self.validate(world.size)
        mesh, environment = begin(world)
        sizes = self.sizes(torch.float32.itemsize, world.size)
        case = Case(mesh, sizes[0], torch.float32, 1)
        found = _entrants(case)
        with agreement(world):
            entrants, notes = self.choose(found)
        case.close()
        titles = {name: entrant.title for name, entrant in entrants.items()}
        if "gloo" in entrants:
            start_gloo(mesh)
        if world.rank == 0 and self.format == "osu":
            print(environment.header(), comments(notes), sep="\n" if notes else "", flush=True)
        rows = [row for elements in sizes for row in self._measure(mesh, elements, list(entrants))]
        if "gloo" in entrants:
            stop_gloo(world)
        if world.rank > 0:
            return
        if self.format == "osu":
            print(_osu(titles, rows), flush=True)
        else:
            print(json.dumps({
                "question": "overlap", "environment": asdict(environment), "notes": notes,
                "titles": titles, "rows": [asdict(row) for row in rows],
            }, indent=1), flush=True)  # fmt: skip

    def _measure(self, mesh: Mesh, elements: int, names: Sequence[str]) -> list[Row]:
        """The rows of one size."""
        case = Case(mesh, elements, torch.float32, 1)
        entrants = present(_entrants(case), names)
        compute = _slice()
        alone = {name: _alone(entrant) for name, entrant in entrants.items()}
        times = take_turns(case.world, {**alone, "": compute}, rounds=3, warmup=1)
        slowest = max(times[name].min() for name in alone)
        slices = max(2, math.ceil(slowest / times[""].min()))
        both = {f"{name} both": _both(entrant, compute, slices) for name, entrant in entrants.items()}
        wrong = {name: _count_wrong(case, entrant, both[f"{name} both"]) for name, entrant in entrants.items()}
        runs = {"compute": lambda: [compute() for _ in range(slices)], **alone, **both}
        times = take_turns(case.world, runs, rounds=self.rounds, warmup=self.warmup)
        case.close()
        rows = []
        for name in entrants:
            of = times["compute"], times[name], times[f"{name} both"]
            computing, reducing, together = (float(np.median(seconds)) * 1e6 for seconds in of)
            hidden = np.median((of[0] + of[1] - of[2]) / np.minimum(of[0], of[1]))
            rows.append(
                Row(
                    contestant=name,
                    size=case.num_bytes,
                    time_us=together,
                    compute_us=computing,
                    all_reduce_us=reducing,
                    overlap_percent=100 * float(hidden),
                    wrong=wrong[name],
                )
            )
        return rows


def _entrants(case: Case) -> Mapping[str, Entrant | str]:
    """By short name: contestants, or why there is none."""
    x, world = case.private(), case.world
    message = mpi_peer.reducible(x)

    def ours(title: str, array: Tensor, algorithm: Algorithm) -> Entrant:
        return Entrant(
            f"mpipar, {title}",
            array,
            lambda: world.start_all_reduce(array, algorithm=algorithm),
            lambda _: world.progress.poll(),
            lambda work: work.wait(),
        )

    return {
        "arena": case.shared if isinstance(case.shared, str) else ours("in the arena", case.shared[0], "auto"),
        "private": ours("in ordinary memory", x, "auto"),
        "ring": ours("ring", x, "ring"),
        "mpi": Entrant(
            mpi_peer.title("Iallreduce, with MPI_Test"),
            x,
            lambda: MPI.COMM_WORLD.Iallreduce(MPI.IN_PLACE, message),
            lambda request: request.Test(),
            lambda request: request.Wait(),
        ),
        "gloo": Entrant(
            f"{gloo.TITLE}, async_op, with its own thread",
            x,
            lambda: dist.all_reduce(x, async_op=True),
            lambda _: None,
            lambda work: work.wait(),
        ),
    }


def _slice() -> Callable[[], object]:
    a, b = torch.ones(_WIDTH, _WIDTH), torch.ones(_WIDTH, _WIDTH)
    out = torch.empty(_WIDTH, _WIDTH)
    return lambda: torch.mm(a, b, out=out)


def _alone(entrant: Entrant) -> Callable[[], object]:
    return lambda: entrant.wait(entrant.start())


def _both(entrant: Entrant, compute: Callable[[], object], slices: int) -> Callable[[], object]:
    def run() -> None:
        work = entrant.start()
        for _ in range(slices):
            compute()
            entrant.poll(work)
        entrant.wait(work)

    return run


def _count_wrong(case: Case, entrant: Entrant, run: Callable[[], object]) -> int:
    """Elements that are wrong after it, over all ranks. Leaves zeros."""
    entrant.x.copy_(patterns.summand(case.world.rank, case.elements, case.dtype))
    run()
    wrong = int((entrant.x != patterns.total(case.world.size, case.elements, case.dtype)).sum())
    entrant.x.zero_()
    return int(case.world.all_reduce(np.array([wrong]))[0])


def _osu(titles: Mapping[str, str], rows: Sequence[Row]) -> str:
    """Tables of osu_iallreduce, with one more column."""
    lines = []
    for name, title in titles.items():
        lines += ["", f"# OSU MPI Non-blocking Allreduce Latency Test: {title}"]
        lines.append("# Size           Overall(us)       Compute(us)    Pure Comm.(us)        Overlap(%)  #wrong")
        for row in rows:
            if row.contestant == name:
                cells = (row.time_us, row.compute_us, row.all_reduce_us, row.overlap_percent)
                lines.append(f"{row.size:<10}" + "".join(f"{cell:>18.2f}" for cell in cells) + f"{row.wrong:>8}")
    return "\n".join(lines)
