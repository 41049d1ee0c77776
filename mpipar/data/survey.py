"""The first pass over the input: what documents there are, and which of them are kept for validation.

A document is chosen for validation by the hash of its content, so the choice does not depend on its place, on its
neighbours or on the rank that reads it. A chosen document that resembles any other goes to training instead: a model
must not be tested on what it has seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpipar.comm import Communicator, agreement, decide_on_root
from mpipar.data.conversations import compared
from mpipar.data.corpus import Piece
from mpipar.data.dedup import NUM_BANDS, content_hash, count_sharing, sketch
from mpipar.data.documents import Form, read_documents
from mpipar.data.plan import deal
from mpipar.data.progress import Progress
from mpipar.data.skipped import LIST_FILE, Noted, Notes, PieceError, Skip, first_records, read_list, write_list
from mpipar.data.templates import Template
from mpipar.data.workshop import Workshop
from mpipar.errors import DataError
from mpipar.storage import ArrayFile, write_arrays

_SKETCH_BYTES = 1 << 20  # a batch, so many bytes or documents, fits in 100 MB of working memory
_SKETCH_DOCUMENTS = 1 << 12
_MIN_CANDIDATES = 64
_SPARE_CANDIDATES = 1.5  # candidates for each document wanted, since some resemble others
_REASONS_GIVEN = 10


@dataclass(frozen=True)
class Survey:
    """What the input holds. The same on all ranks.

    Attributes:
        num_documents: Documents of each piece in (train, val): int64 [num_pieces, 2].
        text_bytes: The bytes of these documents, likewise.
        validation: The content hashes of the documents kept for validation, sorted: uint64 [num_validation].
        skipped: How many files or records were skipped, by reason.
    """

    num_documents: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    validation: NDArray[np.uint64]
    skipped: dict[str, int]

    def is_validation(self, document: bytes) -> bool:
        """Whether a document is kept for validation."""
        key = np.uint64(content_hash(document))
        if not self.validation.size or key > self.validation[-1]:  # as most are: those with the lowest hashes are kept
            return False
        place = int(self.validation.searchsorted(key))
        return bool(self.validation[place] == key)

    def save(self, path: Path) -> None:
        """Writes it to a file. Raises OSError where it cannot."""
        arrays = {
            "num_documents": self.num_documents,
            "text_bytes": self.text_bytes,
            "validation": self.validation,
        }
        write_arrays(path, arrays, {"skipped": json.dumps(self.skipped)})

    @classmethod
    def load(cls, path: Path) -> Survey:
        """What was saved. Raises DataError where the file is damaged."""
        with ArrayFile(path) as file:
            num_documents, text_bytes, validation = (
                file[name].array() for name in ("num_documents", "text_bytes", "validation")
            )
            return cls(num_documents, text_bytes, validation, json.loads(str(file.attributes["skipped"])))


def survey(
    world: Communicator,
    pieces: Sequence[Piece],
    unlisted: Sequence[Skip],
    form: Form,
    val_fraction: float,
    shop: Workshop,
) -> Survey:
    """Collective: reads every piece, on one rank each, and lists in the workshop what has to be skipped.

    Args:
        world: All ranks.
        pieces: The input.
        unlisted: Files of the input of which there are no pieces.
        form: Of its records.
        val_fraction: How much of the text is wanted for validation.
        shop: Where the list is written.

    Raises:
        DataError: Nothing is left to train on, or nothing to validate on.
    """
    mine = deal([piece.text_bytes for piece in pieces], world.size)[world.rank]
    with agreement(world), Notes(shop.work, world.rank) as notes:
        found = _read(pieces, mine, form, val_fraction > 0, notes, shown=world.rank == 0)
    counts = _write_list(world, pieces, unlisted, found, notes, shop)

    with agreement(world):
        validation = _choose(world, found, val_fraction, shop.folder / LIST_FILE)
    chosen = np.isin(found.hashes, validation)
    totals = np.zeros((2, len(pieces), 2), np.int64)  # documents or bytes, piece, split
    np.add.at(totals[0], (found.pieces, chosen.astype(np.int64)), 1)
    np.add.at(totals[1], (found.pieces, chosen.astype(np.int64)), found.num_bytes)
    world.all_reduce(totals)
    return Survey(totals[0], totals[1], np.sort(validation), counts)


@dataclass
class _Found:
    """The documents of this rank's pieces; how many records each piece has, and whether it could be read."""

    pieces: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    num_bytes: NDArray[np.int64]
    sketches: NDArray[np.uint64]
    num_records: NDArray[np.int64]
    broken: NDArray[np.bool_]


class _Documents:
    """Gathers what has to be known of each document, in batches."""

    _FIELDS = (("piece", np.int64), ("hash", np.uint64), ("num_bytes", np.int64))

    def __init__(self, sketched: bool, form: Form):
        self._sketched = sketched
        self._form = form
        self._batch: list[bytes] = []
        self._rows: list[tuple[int, int, int]] = []
        self._batch_bytes = 0
        self._tables = [np.empty(0, list(self._FIELDS))]
        self._sketches = [np.empty((0, NUM_BANDS), np.uint64)]

    def add(self, piece: int, document: bytes) -> None:
        self._rows.append((piece, content_hash(document), len(document)))
        if self._sketched:
            self._batch.append(compared(document) if isinstance(self._form, Template) else document)
            self._batch_bytes += len(document)
        if self._batch_bytes >= _SKETCH_BYTES or len(self._rows) >= _SKETCH_DOCUMENTS:
            self._finish_batch()

    def _finish_batch(self) -> None:
        self._tables.append(np.array(self._rows, list(self._FIELDS)))
        if self._batch:
            self._sketches.append(sketch(self._batch))
        self._batch, self._rows, self._batch_bytes = [], [], 0

    def tables(self) -> tuple[NDArray[np.void], NDArray[np.uint64]]:
        """A row for each document, and its sketch."""
        self._finish_batch()
        table = np.concatenate(self._tables)
        return table, np.concatenate(self._sketches) if self._sketched else np.empty((len(table), 0), np.uint64)


def _read(
    pieces: Sequence[Piece], mine: Sequence[int], form: Form, sketched: bool, notes: Notes, shown: bool
) -> _Found:
    documents = _Documents(sketched, form)
    num_records = np.zeros(len(pieces), np.int64)
    broken = np.zeros(len(pieces), np.bool_)
    with Progress("reading", sum(pieces[index].text_bytes for index in mine), shown) as progress:
        for index in mine:
            try:
                for document in read_documents(pieces[index], form, notes):
                    documents.add(index, document)
            except PieceError as error:
                broken[index] = True
                cut = f"from byte {pieces[index].start:,}: " if pieces[index].is_cut else ""
                notes.skip(None, error.reason, cut + error.detail)
            num_records[index] = notes.num_records
            notes.finish_piece(index)
            progress.advance(pieces[index].text_bytes)
    table, sketches = documents.tables()
    whole = ~broken[table["piece"]]  # of a file that breaks off, what came before counts as unread, too
    table = table[whole]
    return _Found(table["piece"], table["hash"], table["num_bytes"], sketches[whole], num_records, broken)


def _write_list(
    world: Communicator, pieces: Sequence[Piece], unlisted: Sequence[Skip], found: _Found, notes: Notes, shop: Workshop
) -> dict[str, int]:
    """Collective: writes the list of what was skipped; returns how much it is by reason."""
    per_piece = world.all_reduce(np.stack([found.num_records, found.broken.astype(np.int64)]))
    gathered: list[tuple[list[Noted], dict[str, int]]] = world.all_gather_object((notes.noted, notes.counts))
    files = [piece.file.path for piece in pieces]
    before = first_records(files, per_piece[0], per_piece[1] > 0)

    def write() -> None:
        noted = chain.from_iterable(parts for parts, _ in gathered)
        try:
            write_list(shop.folder / LIST_FILE, unlisted, shop.work, noted, files, before)
        except OSError as error:
            raise DataError(f"cannot write {shop.folder / LIST_FILE}: {error.strerror}") from error

    decide_on_root(world, write)
    unlisted_counts: list[dict[str, int]] = [{skip.reason: 1} for skip in unlisted]
    return sum_counts(chain(unlisted_counts, (counts for _, counts in gathered)))


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """What ranks have skipped, together."""
    total: dict[str, int] = {}
    for part in counts:
        for reason, count in part.items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items()))


def _choose(world: Communicator, found: _Found, fraction: float, skipped: Path) -> NDArray[np.uint64]:
    """The hashes of the documents for validation: `fraction` of the text, in the order of the hashes."""
    num_documents, num_bytes = world.all_reduce(np.array([found.hashes.size, found.num_bytes.sum()])).tolist()
    if num_documents == 0:
        reasons = "".join(f"\n  {skip}" for skip in islice(read_list(skipped), _REASONS_GIVEN))
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
