"""Importing tokens that another program has prepared, by all ranks together.

As packing, in two passes: a survey, which looks at every document and chooses those for validation, and the writing of
shards. A document is chosen by the hash of its tokens, so copies of it are on the same side; that documents resemble
each other is not noticed here, since there is no text to compare.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpipar.comm import Communicator, agreement, decide_on_root
from mpipar.data import tokenizer
from mpipar.data.dedup import content_hash
from mpipar.data.make import keep, load_survey, make
from mpipar.data.megatron import MegatronTokens
from mpipar.data.plan import ShardPlan, deal, plan_shards
from mpipar.data.recipe import check_fraction
from mpipar.data.skipped import LIST_FILE, Notes, write_list
from mpipar.data.survey import Survey, sum_counts
from mpipar.data.tokenizer import Tokenizer
from mpipar.data.workshop import Workshop
from mpipar.data.write import Encoded, Tokens, write_shards
from mpipar.errors import DataError

_PIECE_BYTES = 8 << 20
_PIECES_AT_LEAST = 64  # so that as many ranks have work
_METHOD = 1  # part of the fingerprint: counts up whenever the same files become other bits


@dataclass(frozen=True)
class _Source:
    """The files, opened, with the tokenizer that made them.

    Attributes:
        tokens: The files.
        made_by: The tokenizer.
        pieces: Ranges of documents, the unit of work that ranks share.
        text_bytes: Of each token of the tokenizer.
    """

    tokens: MegatronTokens
    made_by: Tokenizer
    pieces: list[tuple[int, int]]
    text_bytes: NDArray[np.int64]

    @classmethod
    def open(cls, prefix: Path, made_by: Tokenizer) -> _Source:
        tokens = MegatronTokens(prefix)
        num_pieces = min(tokens.num_documents, max(_PIECES_AT_LEAST, tokens.num_bytes // _PIECE_BYTES))
        bounds = [tokens.num_documents * i // num_pieces for i in range(num_pieces + 1)]
        return cls(tokens, made_by, list(pairwise(bounds)), made_by.text_bytes())

    def documents(self, piece: int) -> Iterator[tuple[int, Tokens, int]]:
        """Of a piece: (number from 1, tokens with their end of text, bytes of text). Empty ones have no bytes.

        Raises:
            DataError: A token is not the tokenizer's.
        """
        start, stop = self.pieces[piece]
        tokens, bounds = self.tokens.read(start, stop)
        self._check(tokens, bounds, start)
        ids = np.ascontiguousarray(tokens, np.uint32)
        before = np.concatenate([[0], np.cumsum(self.text_bytes[ids])])
        end = np.array([self.made_by.end_of_text], np.uint32)
        for number, (begin, behind) in enumerate(pairwise(bounds.tolist()), start=start + 1):
            document = ids[begin:behind]
            if not document.size or document[-1] != end:
                document = np.concatenate([document, end])
            yield number, document, int(before[behind] - before[begin])

    def _check(self, tokens: NDArray[Any], bounds: NDArray[np.int64], start: int) -> None:
        vocab_size = self.made_by.vocab_size
        if not tokens.size or (tokens.min() >= 0 and tokens.max() < vocab_size):
            return
        place = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
        document = start + int(bounds.searchsorted(place, side="right"))
        raise DataError(
            f"{self.tokens.tokens_path}: token {tokens[place]} in document {document:,}, where the vocabulary of the "
            f"tokenizer has {vocab_size:,}: give the tokenizer.json with which the tokens were made"
        )


def import_megatron(
    world: Communicator, prefix: Path, out: Path, tokenizer_path: Path, val_fraction: float, overwrite: bool = False
) -> None:
    """Collective: makes a data set at `out` of the tokens in PREFIX.bin, and prints what it holds.

    Args:
        world: All ranks.
        prefix: What the names of the two files begin with.
        out: Where.
        tokenizer_path: The tokenizer.json with which the tokens were made.
        val_fraction: The share of the documents that is kept for validation.
        overwrite: Replace another data set that is there.

    Raises:
        DataError: The files are damaged or do not fit the tokenizer, `out` is taken, or the disk is full.
        ConfigError: The fraction is none.
    """
    check_fraction(val_fraction)
    text, record = decide_on_root(world, lambda: _prepare(prefix, tokenizer_path, val_fraction))
    fingerprint = str(record["fingerprint"])
    make(world, out, fingerprint, overwrite, lambda shop: _build(world, shop, prefix, Tokenizer(text), record))


def _prepare(prefix: Path, tokenizer_path: Path, val_fraction: float) -> tuple[str, dict[str, object]]:
    text = tokenizer.load(tokenizer_path).text
    tokens = MegatronTokens(prefix)
    tokens.check()
    states = []
    for path in (tokens.index_path, tokens.tokens_path):
        status = path.stat()
        states.append((os.path.abspath(path), status.st_size, status.st_mtime_ns))
    identity = json.dumps(["megatron", _METHOD, text, val_fraction, states])
    return text, {
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        "inputs": [str(prefix)],
        "num_files": 2,
        "settings": {"format": "megatron", "tokenizer": str(tokenizer_path), "val_fraction": val_fraction},
    }


def _build(
    world: Communicator, shop: Workshop, prefix: Path, made_by: Tokenizer, record: dict[str, Any]
) -> tuple[Survey, int]:
    with agreement(world):
        source = _Source.open(prefix, made_by)
    fraction = record["settings"]["val_fraction"]
    found = load_survey(world, shop, len(source.pieces)) or _survey(world, shop, source, fraction)
    keep(world, shop, found, record, lambda: made_by.text)
    plans = plan_shards(found.num_documents, found.text_bytes)
    return found, write_shards(world, shop, plans, made_by, lambda plan: _documents_of(plan, source, found))


def _documents_of(plan: ShardPlan, source: _Source, found: Survey) -> Iterator[Encoded]:
    for piece in plan.pieces:
        batch: list[Tokens] = []
        batch_bytes = 0
        for _, document, text_bytes in source.documents(piece):
            if text_bytes and found.is_validation(document.tobytes()) == (plan.split == "val"):
                batch.append(document)
                batch_bytes += text_bytes
        yield Encoded(batch, batch_bytes)


def _survey(world: Communicator, shop: Workshop, source: _Source, val_fraction: float) -> Survey:
    """Collective: looks at every document, on one rank each."""
    sizes = [stop - start for start, stop in source.pieces]
    mine = deal(sizes, world.size)[world.rank]
    rows: list[tuple[int, int, int]] = []  # piece, hash, bytes
    tables = [np.empty((0, 3), np.uint64)]
    with agreement(world), Notes(shop.work, world.rank) as notes:
        for piece in mine:
            for number, document, text_bytes in source.documents(piece):
                if text_bytes:
                    rows.append((piece, content_hash(document.tobytes()), text_bytes))
                else:
                    notes.skip(number - source.pieces[piece][0], "empty", "")
            notes.finish_piece(piece)
            tables.append(np.array(rows, np.uint64).reshape(-1, 3))
            rows = []
    table = np.concatenate(tables)
    with agreement(world):
        validation = _choose(world, table[:, 1], val_fraction)
    chosen = np.isin(table[:, 1], validation).astype(np.int64)
    totals = np.zeros((2, len(sizes), 2), np.int64)  # documents or bytes, piece, split
    np.add.at(totals[0], (table[:, 0].astype(np.int64), chosen), 1)
    np.add.at(totals[1], (table[:, 0].astype(np.int64), chosen), table[:, 2].astype(np.int64))
    world.all_reduce(totals)
    return Survey(totals[0], totals[1], validation, _write_list(world, shop, source, notes))


def _choose(world: Communicator, hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.uint64]:
    """Collective: the hashes below the fraction of all that hashes can be; the lowest one at least."""
    limit = np.uint64(int(fraction * 2.0**64))
    low = np.unique(hashes)
    low = low[: max(2, int(low.searchsorted(limit)))]
    everywhere = np.unique(np.concatenate(world.all_gather_object(low)))
    if everywhere.size == 0:
        raise DataError("the files hold no documents but empty ones")
    if fraction == 0:
        return np.empty(0, np.uint64)
    if everywhere.size == 1:
        raise DataError(
            "there is one document, or copies of one, which cannot be split into training and validation. Import "
            "without a validation split by --val-fraction 0"
        )
    return everywhere[: max(1, min(int(everywhere.searchsorted(limit)), everywhere.size - 1))]


def _write_list(world: Communicator, shop: Workshop, source: _Source, notes: Notes) -> dict[str, int]:
    gathered = world.all_gather_object((notes.noted, notes.counts))
    names: Sequence[str] = [str(source.tokens.tokens_path)] * len(source.pieces)

    def write() -> None:
        noted = [part for parts, _ in gathered for part in parts]
        try:
            write_list(shop.folder / LIST_FILE, [], shop.work, noted, names, [start for start, _ in source.pieces])
        except OSError as error:
            raise DataError(f"cannot write {shop.folder / LIST_FILE}: {error.strerror}") from error

    decide_on_root(world, write)
    return sum_counts(counts for _, counts in gathered)
