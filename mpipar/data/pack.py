"""Packing text into a data set, by all ranks together.

    recipe       the input, listed and cut into pieces                              rank 0
    survey       what documents there are, and which are for validation             a piece by one rank
    tokenizer    trained on a sample spread evenly over the input, or given         rank 0
    plan         which shard is made of what: a function of the survey alone
    write        documents -> tokens -> shard                                       a shard by one rank

The rank count decides who does it, and nothing of what is written: the same input and settings give the same bits. All
of it happens in a workshop, where a pack that was killed has left its survey, its tokenizer and its finished shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mpipar.comm import Communicator, cores_per_rank, decide_on_root
from mpipar.data import tokenizer
from mpipar.data.conversations import ChatEncoder
from mpipar.data.corpus import Piece
from mpipar.data.documents import read_documents
from mpipar.data.make import keep, load_survey, make
from mpipar.data.plan import ShardPlan, plan_shards
from mpipar.data.recipe import PackSettings, Recipe, prepare
from mpipar.data.shards import SPLITS
from mpipar.data.skipped import Tally
from mpipar.data.survey import Survey, survey
from mpipar.data.tokenizer import Tokenizer
from mpipar.data.workshop import Workshop
from mpipar.data.write import Encoded, write_shards

_TRAINING_BYTES = 12_000_000
_ENCODE_BYTES = 1 << 20


def pack(
    world: Communicator, inputs: Sequence[str], out: Path, settings: PackSettings, overwrite: bool = False
) -> None:
    """Collective: packs the inputs into a data set at `out`, and prints what it holds.

    Where `out` holds what these inputs and settings have made before, it says so and does nothing. Where a pack of them
    was killed, it does what is missing.

    Raises:
        DataError: An input is missing, nothing in it can be read, `out` is taken, or the disk is full.
    """
    host = world.split_by_host()
    tokenizer.limit_threads(cores_per_rank(host))
    host.free()
    recipe = decide_on_root(world, lambda: prepare(inputs, out, settings))
    make(world, out, recipe.fingerprint, overwrite, lambda shop: _build(world, shop, recipe))


def _build(world: Communicator, shop: Workshop, recipe: Recipe) -> tuple[Survey, int]:
    """Makes the data set; returns also how many shards were there before."""
    settings = recipe.settings
    found = load_survey(world, shop, len(recipe.pieces)) or survey(
        world, recipe.pieces, recipe.skipped, recipe.form, settings.val_fraction, shop
    )
    text = keep(world, shop, found, recipe.record, lambda: recipe.tokenizer or _train(recipe, found).text)
    made_by = Tokenizer(text)
    plans = plan_shards(found.num_documents, found.text_bytes)
    num_before = write_shards(world, shop, plans, made_by, lambda plan: _encoded(plan, recipe, found, made_by))
    return found, num_before


def _train(recipe: Recipe, found: Survey) -> Tokenizer:
    return tokenizer.train(_sample(recipe, found, _TRAINING_BYTES), recipe.settings.vocab_size)


def _sample(recipe: Recipe, found: Survey, num_bytes: int) -> list[str]:
    """Training documents of about so many bytes in all, spread over the pieces in proportion to their sizes."""
    train_bytes = found.text_bytes[:, SPLITS.index("train")]
    share = min(1.0, num_bytes / int(train_bytes.sum()))
    documents = []
    owed = 0.0
    for index in np.flatnonzero(train_bytes).tolist():
        owed += share * int(train_bytes[index])
        for document in _documents(recipe.pieces[index], "train", recipe, found) if owed > 0 else ():
            documents.append(document.decode("utf-8"))
            owed -= len(document)
            if owed <= 0:
                break
    return documents


def _encoded(plan: ShardPlan, recipe: Recipe, found: Survey, made_by: Tokenizer) -> Iterator[Encoded]:
    """A shard's documents, as many at a time as are worth a call."""
    chat = None if recipe.template is None else ChatEncoder(recipe.template, made_by)
    for batch in _batches(plan, recipe, found):
        documents, counted = (made_by.encode(batch), None) if chat is None else chat.encode(batch)
        yield Encoded(documents, sum(map(len, batch)), counted)


def _batches(plan: ShardPlan, recipe: Recipe, found: Survey) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    batch_bytes = 0
    for index in plan.pieces:
        for document in _documents(recipe.pieces[index], plan.split, recipe, found):
            batch.append(document)
            batch_bytes += len(document)
            if batch_bytes >= _ENCODE_BYTES:
                yield batch
                batch, batch_bytes = [], 0
    if batch:
        yield batch


def _documents(piece: Piece, split: str, recipe: Recipe, found: Survey) -> Iterator[bytes]:
    """The documents of one split in a piece. What the survey has skipped is skipped again, without a word."""
    for document in read_documents(piece, recipe.form, Tally()):
        if found.is_validation(document) == (split == "val"):
            yield document
