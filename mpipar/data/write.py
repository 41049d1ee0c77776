"""Writing the shards of a plan, by all ranks; those that are there already are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpipar.comm import Communicator, agreement
from mpipar.data.plan import ShardPlan
from mpipar.data.progress import Progress
from mpipar.data.shard import write_shard
from mpipar.data.tokenizer import Tokenizer
from mpipar.data.workshop import Workshop, kept
from mpipar.errors import DataError

Tokens = NDArray[np.uint32]


class Encoded(NamedTuple):
    """Some documents of a shard."""

    documents: list[Tokens]
    """The tokens of each, with its end of text."""
    text_bytes: int
    """The size of their text."""
    counted: list[NDArray[np.bool_]] | None = None
    """Of each, which tokens count when they are predicted; None if all do."""


def write_shards(
    world: Communicator,
    shop: Workshop,
    plans: Sequence[ShardPlan],
    made_by: Tokenizer,
    read: Callable[[ShardPlan], Iterator[Encoded]],
) -> int:
    """Collective: writes all shards that are not finished. Which rank writes which is decided as they go.

    Args:
        world: All ranks.
        shop: Where.
        plans: The shards.
        made_by: The tokenizer of the tokens.
        read: Yields the documents of a plan in batches.

    Returns:
        How many were finished before.

    Raises:
        DataError: The disk is full, or the documents are not those of the plan.
    """
    finished = shop.finished(world, plans, made_by.identity)
    left = [index for index in range(len(plans)) if index not in finished]
    expected_bytes = sum(plans[index].text_bytes for index in left) // world.size
    with agreement(world), Progress("packing", expected_bytes, shown=world.rank == 0) as progress:
        try:
            for index in shop.claim(plans, left, world.rank, world.size):
                _write(shop, plans[index], made_by, read(plans[index]), progress)
        except DataError:
            shop.stop()
            raise
    return len(finished)


def _write(
    shop: Workshop,
    plan: ShardPlan,
    made_by: Tokenizer,
    batches: Iterator[Encoded],
    progress: Progress,
) -> None:
    documents: list[Tokens] = []
    counted: list[NDArray[np.bool_]] | None = None
    text_bytes = 0
    for batch in batches:
        documents += batch.documents
        if batch.counted is not None:
            counted = [*(counted or []), *batch.counted]
        text_bytes += batch.text_bytes
        progress.advance(batch.text_bytes)
    if (len(documents), text_bytes) != (plan.num_documents, plan.text_bytes):
        raise DataError("the input was changed while it was packed: pack it again when nobody writes to it")
    try:
        write_shard(shop.folder, plan.split, plan.index, plan.num_shards, documents, made_by, text_bytes, counted)
    except DataError as error:
        raise DataError(f"{error}. {kept(shop)}") from error
