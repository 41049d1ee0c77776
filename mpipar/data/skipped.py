"""What of the input could not be read: counted by reason, and listed in skipped.jsonl beside the shards.

One bad record never ends the work on the rest. Each line of the list names a file, the record in it, the reason and a
detail. A record is the line of a .jsonl file or the row of a Parquet file, from 1; null is all of a file, or of a cut.

    {"file": "crawl.jsonl", "record": 1048, "reason": "not JSON", "detail": "Expecting value: line 1 column 1"}

Nothing of it stays in memory: a rank writes down what it meets as it meets it, piece after piece, numbered from the
piece's first record. When all pieces are read, and it is known how many records each has, one rank writes the list, in
the order of the input.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from mpipar.errors import DataError
from mpipar.storage import atomic_file

LIST_FILE = "skipped.jsonl"

Reason = Literal[
    "unreadable",
    "not UTF-8",
    "binary",
    "not JSON",
    "no text",
    "too long",
    "empty",
    "no messages",
    "unknown role",
    "no answer",
]

_SHOWN = 10


@dataclass(frozen=True)
class Skip:
    """A file that was not read, or one record of it."""

    file: str
    record: int | None
    reason: Reason
    detail: str

    def __str__(self) -> str:
        where = "" if self.record is None else f", record {self.record:,}"
        return (
            f"{self.file}{where}: {self.reason} ({self.detail})"
            if self.detail
            else f"{self.file}{where}: {self.reason}"
        )


class PieceError(DataError):
    """A piece of the input that cannot be read."""

    def __init__(self, piece: object, reason: Reason, detail: str):
        super().__init__(f"{piece}: {reason} ({detail})")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        return DataError, (self.message,)


class RecordError(Exception):
    """A record that cannot be read.

    Args:
        reason: The kind of it.
        detail: More of it.
    """

    def __init__(self, reason: Reason, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Tally:
    """What is met while a piece is read. Here nothing is written down."""

    def __init__(self) -> None:
        self.num_records = 0

    def skip(self, record: int | None, reason: Reason, detail: str) -> None:
        """Record number `record` of the piece, from 1, is skipped; None: all of the piece."""


@dataclass(frozen=True)
class Noted:
    """Where a rank has written down what it skipped of a piece: bytes start..stop of its file."""

    piece: int
    rank: int
    start: int
    stop: int


class Notes(Tally):
    """What a rank skips, written down.

    Args:
        folder: Where the ranks' notes are.
        rank: Whose they are.
    """

    def __init__(self, folder: Path, rank: int):
        super().__init__()
        self.counts: dict[str, int] = {}
        self.noted: list[Noted] = []
        self._path = notes_of(folder, rank)
        self._rank = rank
        self._file: IO[bytes] | None = None

    def skip(self, record: int | None, reason: Reason, detail: str) -> None:
        """Raises DataError if it cannot be written down."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        try:
            if self._file is None:
                self._file = self._path.open("wb")
            self._file.write(json.dumps([record, reason, detail]).encode() + b"\n")
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}") from error

    def finish_piece(self, piece: int) -> None:
        """What was skipped since the last call was of this piece."""
        start = self.noted[-1].stop if self.noted else 0
        stop = self._file.tell() if self._file else 0
        if stop > start:
            self.noted.append(Noted(piece, self._rank, start, stop))
        self.num_records = 0

    def __enter__(self) -> Notes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def notes_of(folder: Path, rank: int) -> Path:
    return folder / f"skipped-{rank}"


def first_records(files: Sequence[str], num_records: NDArray[np.int64], broken: NDArray[np.bool_]) -> list[int | None]:
    """How many records of its file come before each piece; None behind a piece that could not be read to its end.

    Args:
        files: The file of each piece; the pieces of a file are neighbours.
        num_records: Of each piece.
        broken: Whether the piece could not be read.
    """
    before: list[int | None] = []
    count: int | None = 0
    for index, file in enumerate(files):
        if index == 0 or file != files[index - 1]:
            count = 0
        before.append(count)
        count = None if count is None or broken[index] else count + int(num_records[index])
    return before


def write_list(
    path: Path,
    unlisted: Iterable[Skip],
    notes: Path,
    noted: Iterable[Noted],
    files: Sequence[str],
    before: Sequence[int | None],
) -> None:
    """Writes the list; no file where nothing was skipped.

    Args:
        path: Where.
        unlisted: Files of which there is no piece.
        notes: The folder of the ranks' notes.
        noted: What is in them, of all ranks.
        files: The file of each piece.
        before: See `first_records`.

    Raises:
        OSError: It cannot be written.
    """
    in_order = sorted(noted, key=lambda part: part.piece)
    skips = chain(unlisted, *(_read_notes(notes, part, files[part.piece], before[part.piece]) for part in in_order))
    first = next(skips, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for skip in chain([first], skips):
            file.write(json.dumps(asdict(skip)) + "\n")


def _read_notes(notes: Path, part: Noted, name: str, before: int | None) -> Iterator[Skip]:
    with notes_of(notes, part.rank).open("rb") as file:
        file.seek(part.start)
        while file.tell() < part.stop:
            record, reason, detail = json.loads(file.readline())
            if record is not None:
                record = None if before is None else before + record
            yield Skip(name, record, reason, detail)


def read_list(path: Path) -> Iterator[Skip]:
    """What was skipped, in the order of the input."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield Skip(**json.loads(line))


def in_words(counts: Mapping[str, int], path: Path) -> list[str]:
    """Lines for the screen: how much was skipped for which reason, and the first few of it but what was only empty."""
    if not counts:
        return []
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))
    lines = [f"skipped {sum(counts.values()):,} files or records: {reasons}. All of them are in {path}"]
    shown = islice((skip for skip in read_list(path) if skip.reason != "empty"), _SHOWN)
    return lines + [f"  {skip}" for skip in shown]
