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

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mpipar.comm import Communicator, decide_on_root
from mpipar.data import tokenizer
from mpipar.data.corpus import Piece
from mpipar.data.documents import read_documents
from mpipar.data.plan import ShardPlan, plan_shards
from mpipar.data.recipe import RECORD_FILE, PackSettings, Recipe, holds, prepare
from mpipar.data.report import describe
from mpipar.data.shards import SPLITS, TOKENIZER_FILE
from mpipar.data.skipped import LIST_FILE, Tally, in_words
from mpipar.data.survey import Survey, survey
from mpipar.data.tokenizer import Tokenizer
from mpipar.data.workshop import Workshop, workshop
from mpipar.data.write import Tokens, write_shards
from mpipar.errors import DataError
from mpipar.storage import atomic_file

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
    started = time.monotonic()
    tokenizer.limit_threads(_cores_of_rank(world))
    recipe, is_packed = decide_on_root(world, lambda: _prepare(inputs, out, settings, overwrite))
    if is_packed:
        verdict = ["already packed from this input with these settings: left as it is (--overwrite packs it again)"]
    else:
        with workshop(world, out, recipe.fingerprint) as shop:
            decide_on_root(world, lambda: _require_free(out, recipe, overwrite))
            found, num_before = _make(world, shop, recipe)
        seconds = time.monotonic() - started
        before = f", which went on from {num_before:,} finished shards" if num_before else ""
        verdict = [f"packed in {seconds:.1f} s by {world.size} rank{'s' * (world.size > 1)}{before}"]
        if world.rank == 0:
            verdict += in_words(found.skipped, out / LIST_FILE)
    if world.rank == 0:
        print("\n".join([describe(out), *verdict]), flush=True)


def _prepare(inputs: Sequence[str], out: Path, settings: PackSettings, overwrite: bool) -> tuple[Recipe, bool]:
    recipe = prepare(inputs, out, settings)
    return recipe, holds(out, recipe.fingerprint, overwrite)


def _require_free(out: Path, recipe: Recipe, overwrite: bool) -> None:
    """`out` was looked at before it was locked."""
    if holds(out, recipe.fingerprint, overwrite):
        raise DataError(f"--out {out} was packed by another process meanwhile: there is nothing left to do")


def _make(world: Communicator, shop: Workshop, recipe: Recipe) -> tuple[Survey, int]:
    """Makes the data set; returns also how many shards were there before."""
    found: Survey | None = decide_on_root(world, lambda: _load_survey(shop, recipe))
    if found is None:
        settings = recipe.settings
        found = survey(world, recipe.pieces, recipe.skipped, settings.text_field, settings.val_fraction, shop)
    made_by = Tokenizer(decide_on_root(world, lambda: _keep(shop, recipe, found)))
    plans = plan_shards(found.num_documents, found.text_bytes)
    num_before = write_shards(world, shop, plans, made_by, lambda plan: _encoded(plan, recipe, found, made_by))
    return found, num_before


def _load_survey(shop: Workshop, recipe: Recipe) -> Survey | None:
    """The survey that a killed pack has left, if there is a whole one."""
    if not shop.survey.exists():
        return None
    try:
        found = Survey.load(shop.survey)
    except DataError:
        return None
    return found if len(found.num_documents) == len(recipe.pieces) else None


def _keep(shop: Workshop, recipe: Recipe, found: Survey) -> str:
    """Writes what is known before the first shard, the survey last of what it takes; returns the tokenizer's text."""
    path = shop.folder / TOKENIZER_FILE
    record = {**recipe.record, "num_skipped": sum(found.skipped.values()), "skipped": found.skipped}
    try:
        if not shop.survey.exists():
            found.save(shop.survey)
        if not path.exists():
            _write_text(path, recipe.tokenizer or _train(recipe, found).text)
        _write_text(shop.folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {error.filename or path}: {error.strerror}") from error


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


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


def _encoded(plan: ShardPlan, recipe: Recipe, found: Survey, made_by: Tokenizer) -> Iterator[tuple[list[Tokens], int]]:
    """The tokens of a shard's documents, and the bytes of their text, as many at a time as are worth a call."""
    for batch in _batches(plan, recipe, found):
        yield made_by.encode(batch), sum(map(len, batch))


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
    for document in read_documents(piece, recipe.settings.text_field, Tally()):
        if found.is_validation(document) == (split == "val"):
            yield document


def _cores_of_rank(world: Communicator) -> int:
    """Collective: a fair share of the cores that the ranks of this host may use."""
    mine = _usable_cores()
    host = world.split_by_host()
    on_host = set().union(*host.all_gather_object(mine))
    share = len(on_host) // host.size
    host.free()
    return max(1, min(len(mine), share))


def _usable_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))  # macOS binds no process
