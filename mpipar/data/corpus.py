"""From what the user names on the command line to documents.

    list_files      inputs  -> files, in one fixed order
    cut             files   -> pieces, the unit of work that ranks share
    read_documents  piece   -> documents, as UTF-8 bytes

A text file is one document; a line of a .jsonl file is one document, its field "text"; .gz is decompressed on the way.
A long text file is cut near line ends into documents of at most one 64th of the whole input, so that a single book can
still be split into training and validation. Long .jsonl files are cut into byte ranges, and a line belongs to the
range in which it begins. All of it is a function of the inputs alone: no rank count enters.

What cannot be read is named and skipped, and never ends the work on the rest.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal, cast

from mpipar.errors import DataError

STDLIB = "stdlib"

Kind = Literal["text", "jsonl"]

_KIB, _MIB = 1 << 10, 1 << 20
_JSONL_RANGE_BYTES = 16 * _MIB
_SHORTEST_CUT_BYTES = 16 * _KIB  # also how far from its place a cut may move to find a line's end
_LONGEST_CUT_BYTES = 1 * _MIB
_MAX_NAMED = 10
_GZIP_RATIO = 4  # what text compresses to, near enough to balance work


@dataclass(frozen=True)
class SourceFile:
    """A file of the input, as it was when it was listed."""

    path: str
    num_bytes: int
    modified_ns: int

    @property
    def kind(self) -> Kind:
        return "jsonl" if self.path.lower().removesuffix(".gz").endswith(".jsonl") else "text"

    @property
    def compressed(self) -> bool:
        return self.path.lower().endswith(".gz")

    @property
    def text_bytes(self) -> int:
        """The size of its text, estimated where it is compressed."""
        return self.num_bytes * _GZIP_RATIO if self.compressed else self.num_bytes


@dataclass(frozen=True)
class Piece:
    """The bytes [start, stop) of a file, up to where its lines end; of a compressed file, always all of it."""

    file: SourceFile
    start: int
    stop: int
    longest_document: int  # in bytes; longer texts that come out of a compressed file are cut

    @property
    def text_bytes(self) -> int:
        return self.file.text_bytes * (self.stop - self.start) // self.file.num_bytes

    def __str__(self) -> str:
        whole = self.stop - self.start == self.file.num_bytes
        return self.file.path if whole else f"{self.file.path} (from byte {self.start})"


@dataclass
class Skipped:
    """What could not be read: how much, and the first few by name."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    @property
    def names_next(self) -> bool:
        return len(self.named) < _MAX_NAMED

    def add(self, what: str) -> None:
        if self.names_next:
            self.named.append(what)
        self.count += 1

    def extend(self, other: Skipped) -> None:
        self.named = (self.named + other.named)[:_MAX_NAMED]
        self.count += other.count


def list_files(inputs: Sequence[str], exclude: Path, skipped: Skipped) -> list[SourceFile]:
    """The files behind files, folders and the word `stdlib`: sorted within a folder, each file once.

    Of a folder: all regular files below it, but hidden ones. What is inside `exclude` (the output) is left out.

    Raises:
        DataError: An input does not exist, or a folder holds no file.
    """
    files: dict[str, SourceFile] = {}
    for name in inputs:
        found = _stdlib_files(skipped) if name == STDLIB else _files_of(Path(name), exclude.resolve(), skipped)
        files.update({os.path.realpath(file.path): file for file in found})
    return list(files.values())


def cut(files: Sequence[SourceFile]) -> list[Piece]:
    """Cuts long files so that no piece holds up the others, in the order of the files."""
    total = sum(file.text_bytes for file in files)
    longest_document = min(max(total // 64, _SHORTEST_CUT_BYTES), _LONGEST_CUT_BYTES)
    pieces = []
    for file in files:
        longest = _JSONL_RANGE_BYTES if file.kind == "jsonl" else longest_document
        num_pieces = 1 if file.compressed else -(-file.num_bytes // longest)
        bounds = [file.num_bytes * i // num_pieces for i in range(num_pieces + 1)]
        pieces += [Piece(file, *range_, longest_document) for range_ in pairwise(bounds)]
    return pieces


def read_documents(piece: Piece, text_field: str, skipped: Skipped) -> Iterator[bytes]:
    """Yields the documents of a piece that are more than white space. Lines that are no such JSON go to `skipped`.

    Raises:
        DataError: The piece cannot be read (to its end: documents may have been yielded before).
    """
    try:
        with open(piece.file.path, "rb") as raw:
            if piece.file.compressed:
                with gzip.open(raw) as stream:
                    yield from _of_stream(cast(BinaryIO, stream), piece, text_field, skipped)
            elif piece.file.kind == "jsonl":
                yield from _of_lines(_lines(raw, piece), piece, text_field, skipped)
            else:
                yield from _of_text(_range(raw, piece))
    except UnicodeDecodeError as error:
        raise DataError(f"{piece}: not UTF-8 text ({error.reason}, {error.start} bytes on)") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{piece}: {reason}") from error


# Listing


def _files_of(path: Path, exclude: Path, skipped: Skipped) -> list[SourceFile]:
    if not os.path.lexists(path):
        raise DataError(
            f"no such input: {path}. An input is a text file, a .jsonl file, either of them with .gz, a folder of "
            f"them, or the word {STDLIB!r} for the Python standard library"
        )
    if not path.is_dir():
        file = _stat(path, skipped)
        return [file] if file else []
    files = [file for below in _walk(path, exclude, skipped) if (file := _stat(below, skipped))]
    if not files and not skipped.count:
        raise DataError(f"{path}: the folder holds no file with text in it (hidden files do not count)")
    return files


def _stdlib_files(skipped: Skipped) -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    below = (path for path in _walk(root, root / "site-packages", skipped) if path.suffix == ".py")
    files = [file for path in below if "dist-packages" not in path.parts and (file := _stat(path, skipped))]
    if not files:
        raise DataError(f"{STDLIB}: this Python has no standard library in source form at {root}")
    return files


def _walk(root: Path, exclude: Path, skipped: Skipped) -> Iterator[Path]:
    """Files below a folder in the order of their names, without following links to folders."""
    for folder, subfolders, names in os.walk(root, onerror=lambda error: skipped.add(f"{error.filename}: {error}")):
        subfolders[:] = [
            name for name in sorted(subfolders) if name[0] != "." and Path(folder, name).resolve() != exclude
        ]
        yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def _stat(path: Path, skipped: Skipped) -> SourceFile | None:
    """The file, or None for an empty one and for what is not a file."""
    try:
        status = path.stat()
    except OSError as error:
        skipped.add(f"{path}: {error.strerror}")
        return None
    if not stat.S_ISREG(status.st_mode):
        skipped.add(f"{path}: not a regular file")
        return None
    return SourceFile(str(path), status.st_size, status.st_mtime_ns) if status.st_size else None


# Reading


def _of_text(text: bytes) -> Iterator[bytes]:
    text.decode("utf-8")
    if b"\0" in text:
        raise OSError("binary, not text (a zero byte in it)")
    if not text.isspace() and text:
        yield text


def _of_lines(lines: Iterator[tuple[int, bytes]], piece: Piece, text_field: str, skipped: Skipped) -> Iterator[bytes]:
    """Documents of (place, line) pairs; the place is what `_line_number` makes a line number of."""
    for place, line in lines:
        if line.isspace():
            continue
        try:
            document = _of_json(line, text_field)
        except (ValueError, RecursionError) as error:
            number = _line_number(piece, place) if skipped.names_next else "?"
            skipped.add(f"{piece.file.path}, line {number}: {error}")
            continue
        if document and not document.isspace():
            yield document


def _of_json(line: bytes, text_field: str) -> bytes:
    record = json.loads(line)
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"expected an object with a text in its field {text_field!r}")
    return text.encode("utf-8")


def _of_stream(stream: BinaryIO, piece: Piece, text_field: str, skipped: Skipped) -> Iterator[bytes]:
    if piece.file.kind == "jsonl":
        yield from _of_lines(enumerate(stream, start=1), piece, text_field, skipped)
        return
    text = b""
    while more := stream.read(piece.longest_document):
        text += more
        if len(text) >= piece.longest_document + _SHORTEST_CUT_BYTES:
            end = piece.longest_document + _next_cut(text[piece.longest_document :][:_SHORTEST_CUT_BYTES])
            yield from _of_text(text[:end])
            text = text[end:]
    yield from _of_text(text)


def _lines(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in the piece, each with its offset in the file."""
    offset = 0
    if piece.start > 0:
        file.seek(piece.start - 1)
        offset = piece.start - 1 + len(file.readline())
    while offset < piece.stop and (line := file.readline()):
        yield offset, line
        offset += len(line)


def _range(file: BinaryIO, piece: Piece) -> bytes:
    """The text between the cuts that belong to the two ends of the piece."""
    start, stop = (_cut_at(file, offset, piece.file.num_bytes) for offset in (piece.start, piece.stop))
    file.seek(start)
    text = file.read(stop - start)
    return text.removeprefix(b"\xef\xbb\xbf") if start == 0 else text  # the mark some editors begin UTF-8 files with


def _cut_at(file: BinaryIO, offset: int, num_bytes: int) -> int:
    """Where the cut that is due at `offset` is made. Two neighbouring pieces compute the same place."""
    if offset in (0, num_bytes):
        return offset
    file.seek(offset)
    return offset + _next_cut(file.read(_SHORTEST_CUT_BYTES))


def _next_cut(window: bytes) -> int:
    """The first end of a line in the window, else the first end of a word, else that of a character."""
    for separator in (b"\n", b" "):
        if (found := window.find(separator)) >= 0:
            return found + 1
    return next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), len(window))


def _line_number(piece: Piece, place: int) -> int:
    """The line at an offset of a plain file; of a compressed file the place is the line's number already."""
    if piece.file.compressed:
        return place
    number, left = 1, place
    with open(piece.file.path, "rb") as file:
        while left > 0 and (block := file.read(min(left, _MIB))):
            number += block.count(b"\n")
            left -= len(block)
    return number
