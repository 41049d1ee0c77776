"""From what the user names on the command line to pieces, the unit of work that ranks share.

    list_files      inputs  -> files, in one fixed order
    cut             files   -> pieces

A long text file is cut near line ends into documents of at most one 64th of the whole input, so that a single book can
still be split into training and validation. Long .jsonl files are cut into byte ranges, and a line belongs to the
range in which it begins. A Parquet file is cut into its row groups. All of it is a function of the inputs alone: no
rank count enters.

What cannot be read is noted and skipped, and never ends the work on the rest.
"""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from mpipar.data import parquet
from mpipar.data.skipped import PieceError, Skip
from mpipar.errors import DataError

STDLIB = "stdlib"
SHORTEST_CUT_BYTES = 16 << 10  # also how far from its place a cut may move to find a line's end

Kind = Literal["text", "jsonl", "parquet"]

_SHORTEST_RANGE_BYTES = 256 << 10
_LONGEST_RANGE_BYTES = 16 << 20
_LONGEST_CUT_BYTES = 1 << 20
_RATIO = 4  # what text compresses to, near enough to balance work


@dataclass(frozen=True)
class SourceFile:
    """A file of the input, as it was when it was listed."""

    path: str
    num_bytes: int
    modified_ns: int

    @property
    def kind(self) -> Kind:
        name = self.path.lower()
        return (
            "parquet"
            if name.endswith(".parquet")
            else "jsonl"
            if name.removesuffix(".gz").endswith(".jsonl")
            else "text"
        )

    @property
    def compressed(self) -> bool:
        return self.path.lower().endswith(".gz")

    @property
    def text_bytes(self) -> int:
        """The size of its text, estimated where it is compressed."""
        return self.num_bytes * _RATIO if self.compressed or self.kind == "parquet" else self.num_bytes


@dataclass(frozen=True)
class Piece:
    """A part of a file that one rank reads.

    Args:
        file: The file.
        start: In bytes, up to where lines end; of a compressed file always 0. Of a Parquet file, the row group.
        stop: Likewise; of a compressed file always all of it.
        text_bytes: The size of its text, estimated where it is compressed.
        longest_document: In bytes; longer texts that come out of a compressed file are cut.
    """

    file: SourceFile
    start: int
    stop: int
    text_bytes: int
    longest_document: int

    @property
    def is_cut(self) -> bool:
        """Whether there is more of a file of text than this."""
        return self.file.kind == "text" and self.stop - self.start < self.file.num_bytes

    def __str__(self) -> str:
        return f"{self.file.path} (from byte {self.start})" if self.is_cut else self.file.path


def list_files(inputs: Sequence[str], exclude: Path, skipped: list[Skip]) -> list[SourceFile]:
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


def cut(files: Sequence[SourceFile], text_field: str, skipped: list[Skip]) -> list[Piece]:
    """Cuts long files so that no piece holds up the others, in the order of the files.

    Raises:
        ConfigError: There is a Parquet file, and pyarrow is not installed.
    """
    total = sum(file.text_bytes for file in files)
    longest_document = min(max(total // 64, SHORTEST_CUT_BYTES), _LONGEST_CUT_BYTES)
    longest_range = min(max(total // 64, _SHORTEST_RANGE_BYTES), _LONGEST_RANGE_BYTES)
    pieces: list[Piece] = []
    for file in files:
        if file.kind == "parquet":
            try:
                sizes = parquet.row_group_bytes(file.path, text_field)
            except PieceError as error:
                skipped.append(Skip(file.path, None, error.reason, error.detail))
                continue
            pieces += [Piece(file, i, i + 1, size, longest_document) for i, size in enumerate(sizes)]
            continue
        longest = longest_range if file.kind == "jsonl" else longest_document
        num_pieces = 1 if file.compressed else -(-file.num_bytes // longest)
        bounds = [file.num_bytes * i // num_pieces for i in range(num_pieces + 1)]
        for start, stop in pairwise(bounds):
            text_bytes = file.text_bytes * (stop - start) // file.num_bytes
            pieces.append(Piece(file, start, stop, text_bytes, longest_document))
    return pieces


def _files_of(path: Path, exclude: Path, skipped: list[Skip]) -> list[SourceFile]:
    if not os.path.lexists(path):
        raise DataError(
            f"no such input: {path}. An input is a text file, a .jsonl file, either of them with .gz, a .parquet file, "
            f"a folder of them, or the word {STDLIB!r} for the Python standard library"
        )
    if not path.is_dir():
        file = _stat(path, skipped)
        return [file] if file else []
    num_skipped = len(skipped)
    files = [file for below in _walk(path, exclude, skipped) if (file := _stat(below, skipped))]
    if not files and all(skip.reason == "empty" for skip in skipped[num_skipped:]):
        raise DataError(f"{path}: the folder holds no file with text in it (hidden files do not count)")
    return files


def _stdlib_files(skipped: list[Skip]) -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    below = (path for path in _walk(root, root / "site-packages", skipped) if path.suffix == ".py")
    files = [file for path in below if "dist-packages" not in path.parts and (file := _stat(path, skipped))]
    if not files:
        raise DataError(f"{STDLIB}: this Python has no standard library in source form at {root}")
    return files


def _walk(root: Path, exclude: Path, skipped: list[Skip]) -> Iterator[Path]:
    """Files below a folder in the order of their names, without following links to folders."""

    def skip(error: OSError) -> None:
        skipped.append(Skip(str(error.filename), None, "unreadable", error.strerror or str(error)))

    for folder, subfolders, names in os.walk(root, onerror=skip):
        subfolders[:] = [
            name for name in sorted(subfolders) if name[0] != "." and Path(folder, name).resolve() != exclude
        ]
        yield from (Path(folder, name) for name in sorted(names) if name[0] != ".")


def _stat(path: Path, skipped: list[Skip]) -> SourceFile | None:
    """The file, or None for an empty one and for what is not a file."""
    try:
        status = path.stat()
    except OSError as error:
        skipped.append(Skip(str(path), None, "unreadable", error.strerror or str(error)))
        return None
    if not stat.S_ISREG(status.st_mode):
        skipped.append(Skip(str(path), None, "unreadable", "not a regular file"))
        return None
    if not status.st_size:
        skipped.append(Skip(str(path), None, "empty", ""))
        return None
    return SourceFile(str(path), status.st_size, status.st_mtime_ns)
