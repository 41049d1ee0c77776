"""The first pass over the input: what documents there are, and which of them are kept for validation.

A document is chosen for validation by the hash of its content, so the choice does not depend on its place, on its
neighbours or on the rank that reads it. A chosen document that resembles any other goes to training instead: a model
must not be tested on what it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from mpipar.comm import Communicator, agreement
from mpipar.data.corpus import Piece, Skipped, read_documents
from mpipar.data.dedup import NUM_BANDS, content_hash, count_sharing, sketch
from mpipar.data.plan import deal
from mpipar.data.progress import Progress
from mpipar.errors import DataError

_SKETCH_BYTES = 1 << 20  # a batch, so many bytes or documents, fits in 100 MB of working memory
_SKETCH_DOCUMENTS = 1 << 12
_MIN_CANDIDATES = 64
_SPARE_CANDIDATES = 1.5  # candidates for each document wanted, since some resemble others


@dataclass(frozen=True)
class Survey:
    """What the input holds. The same on all ranks.

    Attributes:
        num_documents: Documents of each piece in (train, val): int64 [num_pieces, 2].
        text_bytes: The bytes of these documents, likewise.
        validation: The content hashes of the documents kept for validation.
        skipped: What could not be read.
    """

    num_documents: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    validation: frozenset[int]
    skipped: Skipped


def survey(world: Communicator, pieces: Sequence[Piece], text_field: str, val_fraction: float) -> Survey:
    """Collective: reads every piece, on one rank each.

    Raises:
        DataError: Nothing is left to train on, or nothing to validate on.
    """
    mine = deal([piece.text_bytes for piece in pieces], world.size)[world.rank]
    found = _read(pieces, mine, text_field, shown=world.rank == 0)
    skipped = Skipped()
    for _, part in sorted(chain(*world.all_gather_object(found.skipped)), key=lambda item: item[0]):
        skipped.extend(part)

    with agreement(world):
        validation = _choose(world, found, val_fraction, skipped)
    chosen = np.isin(found.hashes, validation)
    totals = np.zeros((2, len(pieces), 2), np.int64)  # documents or bytes, piece, split
    np.add.at(totals[0], (found.pieces, chosen.astype(np.int64)), 1)
    np.add.at(totals[1], (found.pieces, chosen.astype(np.int64)), found.num_bytes)
    world.all_reduce(totals)
    return Survey(totals[0], totals[1], frozenset(validation.tolist()), skipped)


@dataclass
class _Found:
    """The documents of this rank's pieces, and by piece what could not be read."""

    pieces: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    num_bytes: NDArray[np.int64]
    sketches: NDArray[np.uint64]
    skipped: list[tuple[int, Skipped]]


def _read(pieces: Sequence[Piece], mine: Sequence[int], text_field: str, shown: bool) -> _Found:
    records: list[tuple[int, int, int]] = []
    sketches = [np.empty((0, NUM_BANDS), np.uint64)]
    batch: list[bytes] = []
    batch_bytes = 0
    failed: list[int] = []
    found_skipped: list[tuple[int, Skipped]] = []
    with Progress("reading", sum(pieces[index].text_bytes for index in mine), shown) as progress:
        for index in mine:
            skipped = Skipped()
            try:
                for document in read_documents(pieces[index], text_field, skipped):
                    records.append((index, content_hash(document), len(document)))
                    batch.append(document)
                    batch_bytes += len(document)
                    if batch_bytes >= _SKETCH_BYTES or len(batch) >= _SKETCH_DOCUMENTS:
                        sketches.append(sketch(batch))
                        batch, batch_bytes = [], 0
            except DataError as error:
                failed.append(index)
                skipped.add(str(error))
            if skipped.count:
                found_skipped.append((index, skipped))
            progress.advance(pieces[index].text_bytes)
    if batch:
        sketches.append(sketch(batch))
    table = np.array(records, dtype=[("piece", np.int64), ("hash", np.uint64), ("num_bytes", np.int64)])
    whole = ~np.isin(table["piece"], failed)  # of a file that breaks off, what came before counts as unread, too
    table = table[whole]
    return _Found(table["piece"], table["hash"], table["num_bytes"], np.concatenate(sketches)[whole], found_skipped)


def _choose(world: Communicator, found: _Found, fraction: float, skipped: Skipped) -> NDArray[np.uint64]:
    """The hashes of the documents for validation: `fraction` of the text, in the order of the hashes."""
    num_documents, num_bytes = world.all_reduce(np.array([found.hashes.size, found.num_bytes.sum()])).tolist()
    if num_documents == 0:
        reasons = "".join(f"\n  {name}" for name in skipped.named)
        raise DataError(f"the input holds no text that can be read{':' + reasons if reasons else ''}")
    if fraction == 0:
        return np.empty(0, np.uint64)
    hashes, sizes, sketches = _candidates(world, found, fraction)
    sharing = world.all_reduce(count_sharing(sketches, found.sketches))
    alone = (sharing <= 1).all(axis=1)  # each candidate finds itself
    fits = alone & (sizes <= fraction * num_bytes)
    if not fits.any():
        validation = hashes[alone][:1]
    else:
        before = np.cumsum(sizes[fits]) - sizes[fits]
        validation = hashes[fits][before < fraction * num_bytes]
    if validation.size == 0:
        raise DataError(
            f"no document can be kept for validation: all {hashes.size} candidates resemble another of the "
            f"{num_documents} documents. Give more text, or pack without a validation split by --val-fraction 0"
        )
    if validation.size == num_documents:
        raise DataError(
            f"{num_documents} document ({num_bytes:,} bytes) cannot be split into training and validation. Give more "
            "text, or pack without a validation split by --val-fraction 0"
        )
    return validation


def _candidates(
    world: Communicator, found: _Found, fraction: float
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint64]]:
    """Hash, size and sketch of the documents of all ranks whose hashes are lowest, in their order."""
    rank_order = np.argsort(found.hashes, kind="stable")
    limit = np.uint64(min(_SPARE_CANDIDATES * fraction, 0.999) * 2.0**64)
    low = rank_order[: max(_MIN_CANDIDATES, int((found.hashes < limit).sum()))]
    gathered = world.all_gather_object((found.hashes[low], found.num_bytes[low], found.sketches[low]))
    hashes, sizes, sketches = (np.concatenate(column) for column in zip(*gathered, strict=True))
    order = np.argsort(hashes, kind="stable")
    order = order[: max(_MIN_CANDIDATES, int((hashes < limit).sum()))]
    return hashes[order], sizes[order], sketches[order]
