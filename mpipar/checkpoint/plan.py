"""Who writes what of a checkpoint, as a pure function of who holds what on which host.

    held     what each rank has of each tensor: all of it, or a box. Ranks that have the same box are replicas of it
    slice    a box that becomes one data set: replicas on several hosts share it out, in runs of rows
    part     a run of blocks of a slice: the replicas on one host share out a slice of their host's file

Every rank comes to the same plan by itself. Each byte is written once, and where all ranks are replicas, each writes an
equal share of all bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from mpipar.checkpoint.box import Box
from mpipar.checkpoint.dtypes import itemsize
from mpipar.storage import BLOCK_BYTES


@dataclass(frozen=True)
class Held:
    """What a rank has of a tensor.

    Args:
        name: The tensor's single-process name.
        dtype: Its name in torch, such as "bfloat16".
        shape: Of the whole tensor.
        box: What of it this rank has.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box

    @cached_property
    def num_bytes(self) -> int:
        return self.box.size * itemsize(self.dtype)


@dataclass(frozen=True, eq=False)
class Slice:
    """A data set: a box of a tensor in one file. In a plan it is itself, and a key that costs nothing.

    Args:
        held: The tensor, and which box of it.
        file: The number of the file.
    """

    held: Held
    file: int

    @cached_property
    def dataset(self) -> str:
        """Its name in the file."""
        held = self.held
        return held.name if held.box.extent == held.shape else f"{held.name}{held.box}"


@dataclass(frozen=True)
class Part:
    """What one rank writes of a slice.

    Args:
        slice: The slice.
        begin: The first of its bytes, a multiple of BLOCK_BYTES,
        end: and the one behind the last.
    """

    slice: Slice
    begin: int
    end: int


@dataclass(frozen=True)
class Plan:
    """Who writes what.

    Args:
        files: The slices of each file.
        leaders: By file, the rank that reserves and seals it: the lowest of its host.
        file_of: By rank, the file that it writes to.
        parts: By rank, what it writes.
    """

    files: tuple[tuple[Slice, ...], ...]
    leaders: tuple[int, ...]
    file_of: tuple[int, ...]
    parts: tuple[tuple[Part, ...], ...]


def plan(held: Sequence[Sequence[Held]], hosts: Sequence[int]) -> Plan:
    """Shares out the work.

    Args:
        held: By rank, what it has. Boxes of one tensor are the same or have nothing in common.
        hosts: By rank, a number for the host that it is on.
    """
    numbers = {host: file for file, host in enumerate(dict.fromkeys(hosts))}
    file_of = tuple(numbers[host] for host in hosts)
    slices: list[list[Slice]] = [[] for _ in numbers]
    parts: list[list[Part]] = [[] for _ in hosts]
    for ranks, boxes in _by_holders(held).items():
        writers = [[rank for rank in ranks if file_of[rank] == file] for file in range(len(numbers))]
        for file, share in enumerate(_among_hosts(boxes, [len(own) for own in writers])):
            own = [Slice(box, file) for box in share]
            slices[file] += own
            for rank, run in zip(writers[file], _among_neighbours(own, len(writers[file])), strict=True):
                parts[rank] += run
    leaders = tuple(file_of.index(file) for file in range(len(numbers)))
    return Plan(tuple(map(tuple, slices)), leaders, file_of, tuple(map(tuple, parts)))


def _by_holders(held: Sequence[Sequence[Held]]) -> dict[tuple[int, ...], list[Held]]:
    """What is held, by the ranks that hold it."""
    holders: defaultdict[Held, list[int]] = defaultdict(list)
    for rank, own in enumerate(held):
        for box in own:
            holders[box].append(rank)
    classes: defaultdict[tuple[int, ...], list[Held]] = defaultdict(list)
    for box in sorted(holders, key=lambda box: (box.name, box.box.start)):
        classes[tuple(holders[box])].append(box)
    return classes


def _among_hosts(boxes: Sequence[Held], num_writers: Sequence[int]) -> list[list[Held]]:
    """Each host's share of the bytes, as boxes, in proportion to its writers; cut between rows."""
    shares: list[list[Held]] = [[] for _ in num_writers]
    total = sum(box.num_bytes for box in boxes)
    targets = [total * count // max(1, sum(num_writers)) for count in accumulate(num_writers, initial=0)]
    present = next(share for share, count in zip(shares, num_writers, strict=True) if count)
    position = 0
    for box in boxes:
        rows, num_bytes = box.box.num_rows, box.num_bytes
        if num_bytes == 0:
            present.append(box)
            continue
        cuts = [_clip(round((target - position) * rows / num_bytes), rows) for target in targets[:-1]]
        for share, first, last in zip(shares, cuts, [*cuts[1:], rows], strict=True):
            if last > first:
                part = box.box if last - first == rows else box.box.rows(first, last)
                share.append(replace(box, box=part))
        position += num_bytes
    return shares


def _among_neighbours(slices: Sequence[Slice], num_writers: int) -> list[list[Part]]:
    """Each writer's share of the bytes of the slices of one file; cut between blocks."""
    shares: list[list[Part]] = [[] for _ in range(num_writers)]
    total = sum(own.held.num_bytes for own in slices)
    position = 0
    for own in slices:
        num_bytes = own.held.num_bytes
        blocks = -(-num_bytes // BLOCK_BYTES)
        targets = [total * i // num_writers for i in range(num_writers)]
        cuts = [_clip(round((target - position) * blocks / max(1, num_bytes)), blocks) for target in targets]
        for share, first, last in zip(shares, cuts, [*cuts[1:], blocks][:num_writers], strict=True):
            if last > first:
                share.append(Part(own, first * BLOCK_BYTES, min(last * BLOCK_BYTES, num_bytes)))
        position += num_bytes
    return shares


def _clip(value: int, most: int) -> int:
    return min(max(value, 0), most)
