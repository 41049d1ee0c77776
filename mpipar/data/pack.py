"""Packing text into a data set, by all ranks together.

    recipe       the input, listed and cut into pieces                              rank 0
    survey       what documents there are, and which are for validation             a piece by one rank
    tokenizer    trained on a sample spread evenly over the input, or given         rank 0
    plan         which shard is made of what: a function of the survey alone
    write        documents -> tokens -> shard                                       a shard by one rank

The rank count decides who does it, and nothing of what is written: the same input and settings give the same bits. The
set is written in a hidden folder and takes its name when it is whole.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpipar.comm import Communicator, agreement, decide_on_root
from mpipar.data import tokenizer
from mpipar.data.corpus import Piece, Skipped, read_documents
from mpipar.data.dedup import content_hash
from mpipar.data.plan import ShardPlan, deal, plan_shards
from mpipar.data.progress import Progress
from mpipar.data.recipe import RECORD_FILE, PackSettings, Recipe, prepare
from mpipar.data.report import describe
from mpipar.data.shards import SPLITS, TOKENIZER_FILE, write_indices, write_shard
from mpipar.data.survey import Survey, survey
from mpipar.data.tokenizer import Tokenizer
from mpipar.errors import DataError
from mpipar.storage import atomic_folder, remove_partials

_TRAINING_BYTES = 12_000_000
_ENCODE_BYTES = 1 << 20


def pack(
    world: Communicator, inputs: Sequence[str], out: Path, settings: PackSettings, overwrite: bool = False
) -> None:
    """Collective: packs the inputs into a data set at `out`, and prints what it holds.

    Where `out` holds what these inputs and settings have made before, it says so and does nothing.

    Raises:
        DataError: An input is missing, nothing in it can be read, `out` is taken, or the disk is full.
    """
    started = time.monotonic()
    tokenizer.limit_threads(_cores_of_rank(world))
    recipe = decide_on_root(world, lambda: prepare(inputs, out, settings, overwrite))
    if recipe.already_packed:
        verdict = "already packed from this input with these settings: left as it is (--overwrite packs it again)"
    else:
        skipped = _make(world, out, recipe)
        seconds = time.monotonic() - started
        verdict = f"packed in {seconds:.1f} s by {world.size} rank{'s' * (world.size > 1)}{_in_words(skipped)}"
    if world.rank == 0:
        print(f"{describe(out)}\n{verdict}", flush=True)


def _make(world: Communicator, out: Path, recipe: Recipe) -> Skipped:
    """Makes the data set; returns what was skipped."""
    skipped = Skipped()
    skipped.extend(recipe.skipped)
    found = survey(world, recipe.pieces, recipe.settings.text_field, recipe.settings.val_fraction)
    skipped.extend(found.skipped)
    made_by = Tokenizer(decide_on_root(world, lambda: recipe.tokenizer or _train(recipe, found).text))
    plans = plan_shards(found.num_documents, found.text_bytes)
    with ExitStack() as unfinished:  # on rank 0 the hidden folder, which an error removes
        folder = decide_on_root(world, lambda: _begin(unfinished, out))
        with agreement(world):
            if world.rank == 0:
                record = {**recipe.record, "num_skipped": skipped.count, "skipped": skipped.named}
                _write_text(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")
                _write_text(folder / TOKENIZER_FILE, made_by.text)
            _write_shards(world, folder, recipe, plans, found, made_by)
        decide_on_root(world, lambda: write_indices(folder))
        decide_on_root(world, lambda: _commit(unfinished, out))
    return skipped


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


def _write_shards(
    world: Communicator, folder: Path, recipe: Recipe, plans: Sequence[ShardPlan], found: Survey, made_by: Tokenizer
) -> None:
    """Writes this rank's shards."""
    mine = deal([plan.text_bytes for plan in plans], world.size)[world.rank]
    total_bytes = sum(plans[index].text_bytes for index in mine)
    with Progress("packing", total_bytes, shown=world.rank == 0) as progress:
        for index in mine:
            plan = plans[index]
            tokens: list[NDArray[np.uint32]] = []
            text_bytes = 0
            for batch in _batches(plan, recipe, found):
                tokens += made_by.encode([document.decode("utf-8") for document in batch])
                batch_bytes = sum(len(document) for document in batch)
                text_bytes += batch_bytes
                progress.advance(batch_bytes)
            if (len(tokens), text_bytes) != (plan.num_documents, plan.text_bytes):
                raise DataError("the input was changed while it was packed: pack it again when nobody writes to it")
            write_shard(folder, plan.split, plan.index, plan.num_shards, tokens, made_by, text_bytes)


def _batches(plan: ShardPlan, recipe: Recipe, found: Survey) -> Iterator[list[bytes]]:
    """The documents of a shard, as many at a time as are worth a call of the tokenizer."""
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
    for document in read_documents(piece, recipe.settings.text_field, Skipped()):
        if (content_hash(document) in found.validation) == (split == "val"):
            yield document


def _begin(unfinished: ExitStack, out: Path) -> Path:
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        remove_partials(out.resolve().parent, out.resolve().name)  # of a pack into the same folder that was killed
        return unfinished.enter_context(atomic_folder(out.resolve()))
    except OSError as error:
        raise DataError(f"cannot write the data set {out}: {error.strerror}") from error


def _commit(unfinished: ExitStack, out: Path) -> None:
    try:
        unfinished.close()
    except OSError as error:
        raise DataError(f"cannot write the data set {out}: {error.strerror}") from error


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


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


def _in_words(skipped: Skipped) -> str:
    if not skipped.count:
        return ""
    lines = [f"\nskipped, since they could not be read: {skipped.count:,} files or lines", *skipped.named]
    if skipped.count > len(skipped.named):
        lines.append(f"and {skipped.count - len(skipped.named):,} more")
    return "\n  ".join(lines)
