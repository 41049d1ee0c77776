"""Who packs what: pure functions of sizes, so that shards have the same bits at every rank count."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpipar.data.shards import SPLITS

_KIB, _MIB = 1 << 10, 1 << 20
_SHARDS_AT_LEAST = 16  # so that as many ranks have work
_SMALLEST_SHARD_BYTES = 64 * _KIB
_LARGEST_SHARD_BYTES = 128 * _MIB
_MOST_READ = 8  # times the size of a shard: validation is spread thinly, and finding it means reading all


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be made of the documents of one split in these pieces.

    Args:
        split: The split.
        index: Of the shard, in the split.
        num_shards: In the split.
        pieces: What has to be read.
        num_documents: Documents of the split in them.
        text_bytes: Of these documents.
        read_bytes: Of all documents in the pieces.
    """

    split: str
    index: int
    num_shards: int
    pieces: tuple[int, ...]
    num_documents: int
    text_bytes: int
    read_bytes: int


def plan_shards(num_documents: NDArray[np.int64], text_bytes: NDArray[np.int64]) -> list[ShardPlan]:
    """The shards of all splits, of neighbouring pieces each.

    Args:
        num_documents: How many documents each piece has in each split: [num_pieces, num_splits].
        text_bytes: How long they are together, likewise.
    """
    limit = min(max(int(text_bytes.sum()) // _SHARDS_AT_LEAST, _SMALLEST_SHARD_BYTES), _LARGEST_SHARD_BYTES)
    read_bytes = text_bytes.sum(axis=1)
    plans = []
    for column, split in enumerate(SPLITS):
        pieces = np.flatnonzero(num_documents[:, column])
        sizes = np.stack([text_bytes[pieces, column], read_bytes[pieces] // _MOST_READ], axis=1)
        runs = _runs(pieces.tolist(), sizes.tolist(), limit)
        for index, run in enumerate(runs):
            documents, size = num_documents[run, column].sum(), text_bytes[run, column].sum()
            read = read_bytes[run].sum()
            plans.append(ShardPlan(split, index, len(runs), tuple(run), int(documents), int(size), int(read)))
    return plans


def deal(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The items of each rank, so that ranks have about the same to do: largest first, to who has least."""
    loads = [(0, rank) for rank in range(num_ranks)]
    items: list[list[int]] = [[] for _ in range(num_ranks)]
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        load, rank = heapq.heappop(loads)
        items[rank].append(item)
        heapq.heappush(loads, (load + sizes[item], rank))
    return [sorted(mine) for mine in items]


def _runs(pieces: Sequence[int], sizes: Sequence[tuple[int, int]], limit: int) -> list[list[int]]:
    """Cuts a row of pieces so that runs are as long as the limit of both sizes allows, and have one piece at least."""
    runs: list[list[int]] = []
    room = [0, 0]
    for piece, (size, read) in zip(pieces, sizes, strict=True):
        if not runs or size > room[0] or read > room[1]:
            runs.append([])
            room = [limit, limit]
        runs[-1].append(piece)
        room = [room[0] - size, room[1] - read]
    return runs
