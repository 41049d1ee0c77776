"""From a piece of the input to its documents, as UTF-8 bytes.

A text file is one document, or several if it is long; a line of a .jsonl file is one document, its field "text" or its
conversation; so is a row of a Parquet file, its column "text". .gz is decompressed on the way. Nothing is ever read
whole that may be large: a line is given up where it is longer than any document can be.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from mpipar.data import parquet
from mpipar.data.conversations import FORMS, conversation
from mpipar.data.corpus import SHORTEST_CUT_BYTES, Piece
from mpipar.data.skipped import PieceError, RecordError, Tally
from mpipar.data.templates import Template

LONGEST_RECORD_BYTES = 16 << 20
"""A longer line or text is no document but a dump, and would hold up everything else."""

_MIB = 1 << 20
_MARK = b"\xef\xbb\xbf"  # which some editors begin UTF-8 files with
_TOO_LONG = f"more than {LONGEST_RECORD_BYTES >> 20} MiB"


Form = str | Template
"""What a record is: an object with a text in the field (or column) of this name, or a conversation."""


def read_documents(piece: Piece, form: Form, tally: Tally) -> Iterator[bytes]:
    """Yields the documents of a piece that are more than white space. What else its records are goes to the tally.

    Args:
        piece: The piece; for conversations, of a .jsonl file.
        form: Of its records, unless it is text.
        tally: Of records, and those that are skipped.

    Raises:
        PieceError: The piece cannot be read (to its end: documents may have been yielded before).
    """
    try:
        if piece.file.kind == "parquet":
            assert isinstance(form, str)
            yield from _of_rows(parquet.read_texts(piece.file.path, piece.start, form), tally)
            return
        with open(piece.file.path, "rb") as raw:
            if piece.file.compressed:
                with gzip.open(raw) as stream:
                    yield from _of_stream(cast(BinaryIO, stream), piece, form, tally)
            elif piece.file.kind == "jsonl":
                yield from _of_lines(_lines_of_range(raw, piece), form, tally)
            else:
                yield from _of_text(_range(raw, piece), piece, tally)
    except RecordError as error:
        raise PieceError(piece, error.reason, error.detail) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PieceError(piece, "unreadable", reason) from error


# Texts


def _of_text(text: bytes, piece: Piece, tally: Tally) -> Iterator[bytes]:
    _check_utf8(text)
    if b"\0" in text:
        raise RecordError("binary", "a zero byte in it")
    if text and not text.isspace():
        yield text
    elif not piece.is_cut:
        tally.skip(None, "empty", "")


def _of_stream(stream: BinaryIO, piece: Piece, form: Form, tally: Tally) -> Iterator[bytes]:
    if piece.file.kind == "jsonl":
        yield from _of_lines(_lines(stream), form, tally)
        return
    text = b""
    while more := stream.read(piece.longest_document):
        text += more
        if len(text) >= piece.longest_document + SHORTEST_CUT_BYTES:
            end = piece.longest_document + _next_cut(text[piece.longest_document :][:SHORTEST_CUT_BYTES])
            yield from _of_text(text[:end], piece, tally)
            text = text[end:]
    yield from _of_text(text, piece, tally)


def _range(file: BinaryIO, piece: Piece) -> bytes:
    """The text between the cuts that belong to the two ends of the piece."""
    start, stop = (_cut_at(file, offset, piece.file.num_bytes) for offset in (piece.start, piece.stop))
    file.seek(start)
    text = file.read(stop - start)
    return text.removeprefix(_MARK) if start == 0 else text


def _cut_at(file: BinaryIO, offset: int, num_bytes: int) -> int:
    """Where the cut that is due at `offset` is made. Two neighbouring pieces compute the same place."""
    if offset in (0, num_bytes):
        return offset
    file.seek(offset)
    return offset + _next_cut(file.read(SHORTEST_CUT_BYTES))


def _next_cut(window: bytes) -> int:
    """The first end of a line in the window, else the first end of a word, else that of a character."""
    for separator in (b"\n", b" "):
        if (found := window.find(separator)) >= 0:
            return found + 1
    return next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), len(window))


# Records


def _of_lines(lines: Iterator[bytes | None], form: Form, tally: Tally) -> Iterator[bytes]:
    """Documents of lines; None is a line that was too long to be read. Blank lines are no records, but are counted."""
    for line in lines:
        tally.num_records += 1
        if line is not None and line.isspace():
            continue
        try:
            if line is None:
                raise RecordError("too long", _TOO_LONG)
            yield _of_json(line, form)
        except RecordError as error:
            tally.skip(tally.num_records, error.reason, error.detail)


def _of_rows(rows: Iterator[bytes | None], tally: Tally) -> Iterator[bytes]:
    for text in rows:
        tally.num_records += 1
        try:
            if text is None:
                raise RecordError("no text", "null")
            if len(text) > LONGEST_RECORD_BYTES:
                raise RecordError("too long", _TOO_LONG)
            _check_utf8(text)
            yield _not_empty(text)
        except RecordError as error:
            tally.skip(tally.num_records, error.reason, error.detail)


def _of_json(line: bytes, form: Form) -> bytes:
    try:
        record = json.loads(line.removeprefix(_MARK).decode("utf-8"))  # of bytes, json would guess the encoding
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error
    except (ValueError, RecursionError) as error:
        raise RecordError("not JSON", str(error)) from error
    try:
        return conversation(record, form) if isinstance(form, Template) else _text(record, form)
    except UnicodeEncodeError as error:  # half of a pair of \ud800 escapes
        raise RecordError("not UTF-8", f"{error.reason}, at character {error.start}") from error


def _text(record: object, text_field: str) -> bytes:
    if not isinstance(record, dict):
        raise RecordError("no text", f"expected an object with a text in its field {text_field!r}, got no object")
    text = record.get(text_field)
    if not isinstance(text, str):
        got = f"got {type(text).__name__}" if text_field in record else f"got {', '.join(map(repr, record)) or 'none'}"
        hint = "; conversations are packed with --chat" if FORMS.keys() & record.keys() else ""
        raise RecordError("no text", f"expected a text in the field {text_field!r}, {got[:200]}{hint}")
    return _not_empty(text.encode("utf-8"))


def _not_empty(text: bytes) -> bytes:
    if not text or text.isspace():
        raise RecordError("empty", "")
    return text


def _check_utf8(text: bytes) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from error


def _not_utf8(error: UnicodeDecodeError) -> RecordError:
    return RecordError("not UTF-8", f"{error.reason}, {error.start} bytes on")


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    while read := _read_line(stream):
        yield read[0]


def _lines_of_range(file: BinaryIO, piece: Piece) -> Iterator[bytes | None]:
    """The lines that begin in the piece."""
    offset = 0
    if piece.start > 0:  # the line in which the range begins is its neighbour's
        offset = piece.start - 1
        file.seek(offset)
        while offset < piece.stop and (part := file.readline(_MIB)):
            offset += len(part)
            if part.endswith(b"\n"):
                break
    while offset < piece.stop and (read := _read_line(file)):
        offset += read[1]
        yield read[0]


def _read_line(stream: BinaryIO) -> tuple[bytes | None, int] | None:
    """The next line, or None in its place if it is too long, and its length; None at the end."""
    line = stream.readline(LONGEST_RECORD_BYTES)
    if not line:
        return None
    if line.endswith(b"\n") or len(line) < LONGEST_RECORD_BYTES:
        return line, len(line)
    length = len(line)
    while part := stream.readline(_MIB):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return None, length
