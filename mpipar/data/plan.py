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


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be made of the documents of one split in these pieces."""

    split: str
    index: int
    num_shards: int
    pieces: tuple[int, ...]
    num_documents: int
    text_bytes: int


def plan_shards(num_documents: NDArray[np.int64], text_bytes: NDArray[np.int64]) -> list[ShardPlan]:
    """The shards of all splits, of neighbouring pieces each.

    Args:
        num_documents: How many documents each piece has in each split: [num_pieces, num_splits].
        text_bytes: How long they are together, likewise.
    """
    limit = min(max(int(text_bytes.sum()) // _SHARDS_AT_LEAST, _SMALLEST_SHARD_BYTES), _LARGEST_SHARD_BYTES)
    plans = []
    for column, split in enumerate(SPLITS):
        pieces = np.flatnonzero(num_documents[:, column]).tolist()
        runs = _runs(pieces, text_bytes[:, column].tolist(), limit)
        for index, run in enumerate(runs):
            documents, size = num_documents[run, column].sum(), text_bytes[run, column].sum()
            plans.append(ShardPlan(split, index, len(runs), tuple(run), int(documents), int(size)))
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


def _runs(pieces: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cuts a row of pieces so that each run is as long as the limit allows, and has one piece at least."""
    runs: list[list[int]] = []
    room = 0
    for piece in pieces:
        if not runs or sizes[piece] > room:
            runs.append([])
            room = limit
        runs[-1].append(piece)
        room -= sizes[piece]
    return runs
