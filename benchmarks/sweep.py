"""What the questions over sizes share. Each of them only states its contestants, what is right, and what is possible.

For each size every contestant is checked, then all take turns, and with them the limit: what the machine could do at
best (see `limits`). Before each measurement every rank writes its array, as backward does. Small sizes are repeated
within a measurement, all contestants equally often. Arrays are zero, so that no sum grows from one to the next.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Case, Contestant
from benchmarks.formats import LIMIT, Report, Row, as_json, nccl, osu
from benchmarks.gloo import start_gloo, stop_gloo
from benchmarks.limits import Copy, link_speed, together
from benchmarks.machine import begin, comments
from benchmarks.measure import Seconds, ratio, repetitions, take_turns
from benchmarks.options import SizeOptions, present, require_at_least
from benchmarks.plot import check_plot, draw
from mpipar.comm import Communicator, Mesh, agreement
from mpipar.errors import ConfigError

_WRITTEN_BYTES = 64 << 10  # from here on what is in which cache counts for more than the clock's grain

_PRINTERS: dict[str, Callable[[Report], str]] = {"nccl": nccl, "osu": osu, "json": as_json}


@dataclass(frozen=True)
class Link:
    """What there is between the hosts.

    Args:
        host_of: The number of the host, by rank.
        bytes_per_s: From one host to the next.
    """

    host_of: Sequence[int]
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Sweep(SizeOptions, ABC):
    """A question that is asked for a range of sizes."""

    dtype: Literal["float32", "float64", "float16", "bfloat16", "int32", "int64"] = "float32"
    """Of the elements. MPI adds up no 16-bit floats, and is left out there."""
    repeat: int = 0
    """Calls in a row in one measurement, whose mean is taken; 0: one, and of small arrays as many as a millisecond
    holds."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the arrays are. On GPUs, which the ranks of a host take in turn, nobody but mpipar takes part."""
    check: bool = True
    """Count the elements that are wrong, before anything is timed."""
    format: Literal["nccl", "osu", "json"] = "nccl"
    """Tables of nccl-tests or of the OSU benchmarks, or one JSON document."""
    plot: Path | None = None
    """Also draw algbw and busbw over size into this PNG."""

    question: ClassVar[str]
    osu_name: ClassVar[str] = ""  # of the operation, among the OSU benchmarks
    redop: ClassVar[str]  # the reduction, or "none"
    num_arrays: ClassVar[int] = 1  # of the array's size, that a rank needs
    num_doubles: ClassVar[int] = 0  # and of float64 arrays of as many elements

    @abstractmethod
    def contestants(self, case: Case) -> Mapping[str, Contestant | str]:
        """By short name, in the order of the tables: contestants, or why there is none. Collective."""

    @abstractmethod
    def given(self, case: Case) -> Tensor:
        """What this rank puts into a contestant's source for the check."""

    @abstractmethod
    def wanted(self, case: Case) -> Tensor:
        """What has then to be in a contestant's result."""

    def bus_factor(self, num_ranks: int) -> float:
        """busbw / algbw: bytes that a rank has to send round a ring, over the size. By default all chunks but one."""
        return (num_ranks - 1) / num_ranks

    def count(self, elements: int, num_ranks: int) -> int:
        """Elements as nccl-tests counts them for this operation. By default those of a chunk."""
        return elements // num_ranks

    @abstractmethod
    def copies(self, num_ranks: int, rank: int, num_bytes: int) -> list[Copy]:
        """The limit on a host: the copies that a rank has to make between shared arrays of `num_bytes`."""

    @abstractmethod
    def bytes_leaving(self, host_of: Sequence[int], num_bytes: int) -> float:
        """The limit between hosts: bytes that have to leave the busiest of them. `host_of` is by rank."""

    @property
    def osu_test(self) -> str:
        """What the OSU benchmarks call their test of it."""
        return f"{self.osu_name} Latency Test"

    def validate(self, num_ranks: int) -> None:
        super().validate(num_ranks)
        require_at_least(self, repeat=0)

    def run(self, world: Communicator) -> None:
        """Measures and prints. Collective."""
        with agreement(world):
            self.validate(world.size)
            if self.plot is not None and world.rank == 0:
                check_plot(self.plot)
        mesh, environment = begin(world)
        with agreement(world):
            self._take_device(mesh)
        sizes = self.sizes(self._dtype.itemsize, world.size)
        entrants, notes = self._entrants(mesh, sizes[0])
        if self.device == "cuda":
            notes.append(f"arrays on {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
        titles = {name: entrant.title for name, entrant in entrants.items()}
        if "gloo" in entrants:
            start_gloo(mesh)
        link = _link(mesh) if mesh.num_hosts > 1 else None
        if link is not None:
            notes.append(f"link from host to host: {link.bytes_per_s / 1e9:.3f} GB/s")
        if world.rank == 0 and self.format != "json":
            print(environment.header(), comments(notes), sep="\n" if notes else "", flush=True)
        rows = [row for elements in sizes for row in self._measure(mesh, elements, list(entrants), link)]
        if "gloo" in entrants:
            stop_gloo(world)
        if world.rank > 0:
            return
        if any(row.contestant == LIMIT for row in rows):
            titles[LIMIT] = "the limit: " + ("the links between hosts" if link else "copying the same memory")
        report = Report(
            question=self.question,
            osu_test=self.osu_test,
            dtype=self.dtype,
            redop=self.redop,
            environment=environment,
            notes=notes,
            titles=titles,
            ours=[name for name, entrant in entrants.items() if entrant.ours],
            rows=rows,
        )
        print(_PRINTERS[self.format](report), flush=True)
        if self.plot is not None:
            draw(report, self.plot)

    @property
    def _dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def _case(self, mesh: Mesh, elements: int) -> Case:
        device = torch.device("cpu") if self.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
        return Case(mesh, elements, self._dtype, self.num_arrays, self.num_doubles, device)

    def _take_device(self, mesh: Mesh) -> None:
        """This rank's GPU becomes the current one."""
        if self.device == "cpu":
            return
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device on this host")
        torch.cuda.set_device(mesh.host.rank % torch.cuda.device_count())

    def _entrants(self, mesh: Mesh, elements: int) -> tuple[dict[str, Contestant], list[str]]:
        """(who takes part, why others do not), found out with a small case."""
        case = self._case(mesh, elements)
        found = dict(self.contestants(case))
        if self.device == "cuda":
            for name, contestant in found.items():
                if isinstance(contestant, Contestant) and not contestant.ours:
                    found[name] = "it takes no arrays on a GPU here"
        with agreement(mesh.world):
            entrants, notes = self.choose(found)
        case.close()
        return entrants, notes

    def _measure(self, mesh: Mesh, elements: int, names: Sequence[str], link: Link | None) -> list[Row]:
        """The rows of one size."""
        case = self._case(mesh, elements)
        entrants = present(self.contestants(case), names)
        wrong = self._count_wrong(case, entrants)
        runs = {f"{name} {call}": run for name, entrant in entrants.items() for call, run in entrant.calls.items()}
        is_small = case.num_bytes < _WRITTEN_BYTES
        repeat = self.repeat or (repetitions(mesh.world, runs) if is_small else 1)
        copies = self.copies(mesh.world.size, mesh.world.rank, case.num_bytes)
        copy = case.copying(copies) if mesh.num_hosts == 1 else None
        if copy is not None:
            runs[LIMIT] = together(mesh.world, copy) if mesh.host.size > (os.cpu_count() or 1) else copy
        written = {f"{name} {call}": [entrant.source] for name, entrant in entrants.items() for call in entrant.calls}
        written[LIMIT] = [] if isinstance(case.shared, str) else case.shared

        def write(name: str) -> None:
            for array in written[name]:
                case.touch(array)

        if self.device == "cuda":
            runs = {name: _settled(run, case) for name, run in runs.items()}
        times = take_turns(mesh.world, runs, rounds=self.rounds, warmup=self.warmup, repeat=repeat, prepare=write)
        case.close()
        limit = times.get(LIMIT)
        if link is not None and (leaving := self.bytes_leaving(link.host_of, case.num_bytes)) > 0:
            limit = np.full(self.rounds, leaving / link.bytes_per_s)

        def row(contestant: str, call: str, seconds: Seconds, wrong: int | None) -> Row:
            return Row(
                contestant=contestant,
                size=case.num_bytes,
                count=self.count(elements, mesh.world.size),
                call=call,
                times=seconds,
                repeat=repeat,
                wrong=wrong,
                limit=None if limit is None else ratio(limit, seconds)[0],
                bus_factor=self.bus_factor(mesh.world.size),
            )

        rows = []
        for name, entrant in entrants.items():
            of = {call: times[f"{name} {call}"] / entrant.operations for call in entrant.calls}
            best = min(of, key=lambda call: float(np.median(of[call])))
            rows.append(row(name, best, of[best], wrong[name]))
        if limit is not None:
            rows.append(row(LIMIT, "copyto" if link is None else "Isend", limit, None))
        return rows

    def _count_wrong(self, case: Case, entrants: Mapping[str, Contestant]) -> dict[str, int | None]:
        """Elements that are wrong after any of a contestant's calls, over all ranks. Leaves zeros."""
        if not self.check:
            return dict.fromkeys(entrants)
        given, wanted = self.given(case), self.wanted(case)
        counts: dict[str, int | None] = {}
        for name, entrant in entrants.items():
            wrong = np.zeros(1, np.int64)
            for run in entrant.calls.values():
                entrant.result.zero_()
                entrant.source.copy_(given)
                run()
                wrong += int((entrant.result.cpu() != wanted[: entrant.result.numel()]).sum())
            entrant.source.zero_()
            entrant.result.zero_()
            counts[name] = int(case.world.all_reduce(wrong)[0])
        return counts


def _settled(run: Callable[[], object], case: Case) -> Callable[[], None]:
    """Until the device has done it: a collective returns when it was given."""

    def run_and_settle() -> None:
        run()
        case.settle()

    return run_and_settle


def _link(mesh: Mesh) -> Link:
    """Collective: measures it."""
    hosts = mesh.world.topology.hosts
    host_of = [next(i for i, ranks in enumerate(hosts) if rank in ranks) for rank in range(mesh.world.size)]
    return Link(host_of, link_speed(mesh.world))
