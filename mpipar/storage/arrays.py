"""Reading named arrays from one HDF5 file, by `pread`, with a CRC-32 for every 256 KiB of each; `writer` writes them.

A flipped bit is found when its block is first touched. `header` says how the file is laid out, `files` how it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mpipar.errors import DamagedError, DataError
from mpipar.storage.checksum import crc32
from mpipar.storage.files import BYTE, RESTORE, OpenFile, OpenFiles
from mpipar.storage.header import (
    BLOCK_BYTES,
    USER_BLOCK_BYTES,
    Extent,
    Header,
    HeaderError,
    UserBlock,
    parse,
    parse_user_block,
    user_block,
)

Array = np.ndarray[Any, Any]


_AHEAD_BLOCKS = 16  # that a long read asks the system to fetch while it checks those before


class ArrayFile:
    """A file of arrays, for reading.

    Args:
        path: A file that `write_arrays` wrote.
        header: Of the file, where it is known already: then the file is opened when it is first read, and has to be
            the one that the header is of.
        files: Keeps it open, with others; by default it stays open until `close`.

    Raises:
        DataError: The file is missing, truncated, damaged in its header, or another program's.
    """

    __slots__ = ("_arrays", "_files", "_known", "_owns_files", "_places", "attributes", "header", "held", "path")

    def __init__(self, path: str | os.PathLike[str], *, header: Header | None = None, files: ArrayFiles | None = None):
        self.path = Path(path)
        self._files: ArrayFiles = OpenFiles(1) if files is None else files
        self._owns_files = files is None
        self.held: OpenArrays | None = None
        """What is open of it; for `OpenFiles` to set."""
        self._known: Header | None = None
        self._known = self.header = self._read_header() if header is None else header
        self.attributes = self.header.layout.attributes
        self._arrays: dict[str, StoredArray] = {}  # those that were asked for
        self._places: dict[str, tuple[Extent, int]] = {}  # and where each is, with the number of its first block
        first_block = 0
        for extent in self.header.layout.extents:
            self._places[extent.name] = extent, first_block
            first_block += extent.num_blocks

    def __repr__(self) -> str:
        return f"ArrayFile({str(self.path)!r})"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays, sorted."""
        return tuple(self._places)

    def __getitem__(self, name: str) -> StoredArray:
        if name not in self._places:
            raise DataError(f"{self.path}: has no array {name!r}; it has {', '.join(self.names) or 'none'}")
        if name not in self._arrays:
            self._arrays[name] = StoredArray(self, *self._places[name])
        return self._arrays[name]

    def open(self) -> OpenArrays:
        """Opens the file and looks whether it is the one that is known; called by what keeps it open."""
        opened = OpenArrays(self.path)
        if self._known is not None:
            with self._named():
                if opened.read_user_block() != self._known.block:
                    raise HeaderError("is not the file that was described before: it was replaced")
        return opened

    def opened(self) -> OpenArrays:
        """The file, open. It stays so as long as somebody holds what this returns."""
        held = self.held
        if held is None:
            return self._files.open(self)
        held.asked = True
        return held

    def crcs(self) -> Array:
        """What the checksums of all blocks have to be, [blocks]; they are numbered through all arrays."""
        opened = self.opened()
        if opened.checksums is None:
            with self._named():
                opened.checksums = opened.read_checksums(self.header)
        return opened.checksums

    def verify(self) -> None:
        """Checks every byte of the file: every block of every array, and that nothing was put between them.

        Raises:
            DataError: Names the first damage.
        """
        for name in self.names:
            self[name].verify()
        opened, layout = self.opened(), self.header.layout
        end = self.header.block.header_bytes
        extents = [extent for extent in (*layout.extents, layout.checksums) if extent.size]
        bounds = sorted((extent.offset, extent.offset + extent.nbytes) for extent in extents)
        for begin, following in [*bounds, (layout.file_bytes, layout.file_bytes)]:
            if opened.read(end, begin).any():
                where = f"between bytes {end:,} and {begin:,}, which should be zeros"
                raise DamagedError(f"{self.path}: is damaged {where}", RESTORE)
            end = following

    def close(self) -> None:
        """Ends the reading. Where others keep the file open, they end it."""
        if self._owns_files:
            self._files.close()

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_header(self) -> Header:
        opened = self.opened()
        with self._named():
            block = opened.read_user_block()
            metadata = opened.read(USER_BLOCK_BYTES, block.header_bytes).tobytes()
            header = Header(block, parse(metadata, block))
            opened.checksums = checksums = opened.read_checksums(header)
            if opened.read_front() != user_block(header.layout, metadata, checksums.tobytes()):
                raise HeaderError("has a damaged user block")
        return header

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except HeaderError as error:
            raise DamagedError(f"{self.path} {error}", RESTORE) from error


class StoredArray:
    """One array of a file. `size` counts elements; they are numbered in C order."""

    __slots__ = (
        "_all_checked",
        "_file",
        "_first_block",
        "_itemsize",
        "_nbytes",
        "_num_blocks",
        "_offset",
        "_unchecked",
        "dtype",
        "name",
        "shape",
        "size",
    )

    def __init__(self, file: ArrayFile, extent: Extent, first_block: int):
        self.name, self.shape, self.dtype, self.size = extent.name, extent.shape, extent.dtype, extent.size
        self._file = file
        self._itemsize = extent.dtype.itemsize
        self._offset = extent.offset
        self._nbytes = extent.nbytes
        self._first_block = first_block  # among those of all arrays
        self._num_blocks = extent.num_blocks
        self._forget()

    def _forget(self) -> None:
        self._unchecked = bytearray(b"\1" * self._num_blocks)  # a byte a block: 1 until its checksum was right
        self._all_checked = not self._num_blocks

    @property
    def crcs(self) -> Array:
        """The checksums of its blocks, [blocks]."""
        return self._file.crcs()[self._first_block : self._first_block + self._num_blocks]

    def read(self, start: int, stop: int) -> Array:
        """Elements start..stop as a new one-dimensional array; blocks that were not touched before are checked.

        Raises:
            DataError: A touched block is damaged, or the file was truncated or replaced meanwhile.
            IndexError: The range is not within the array.
        """
        if not 0 <= start <= stop <= self.size:  # before there is memory for it
            raise self._outside(start, stop)
        out = np.empty(stop - start, self.dtype)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: Array) -> None:
        """Fills an array that lies in one piece with the elements from `start` on, as in `read`, or converted."""
        if out.dtype != self.dtype:
            out.reshape(-1)[:] = self.read(start, start + out.size)
            return
        begin = start * self._itemsize
        end = begin + out.nbytes
        if begin < 0 or end > self._nbytes:
            raise self._outside(start, start + out.size)
        # As a rule all was checked before. Then a read costs one system call and what Python takes to come to it, which
        # is as much: so the way there is short, and touches few objects, which with many shards are in no cache.
        held = self._file.held
        if held is not None and (self._all_checked or not self._is_unchecked(begin, end)):
            if not held.asked:
                held.asked = True
            held.read_into(out, self._offset + begin)
        else:
            self._read_checked(begin, out.reshape(-1).view(BYTE))

    def array(self) -> Array:
        """The whole array in its shape, checked."""
        return self.read(0, self.size).reshape(self.shape)

    def verify(self) -> None:
        """Checks every block, also those already checked. Raises DataError that names the first damaged one."""
        self._forget()
        raw = np.empty(BLOCK_BYTES, BYTE)
        for begin in range(0, self._nbytes, BLOCK_BYTES):
            self._read_checked(begin, raw[: self._nbytes - begin])

    def _is_unchecked(self, begin: int, end: int) -> bool:
        """Whether a checksum of these bytes was not looked at yet."""
        return self._unchecked.find(1, begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)) >= 0

    def _outside(self, start: int, stop: int) -> IndexError:
        return IndexError(f"elements {start} to {stop} of array {self.name!r}, which has {self.size}")

    def _read_checked(self, begin: int, target: Array) -> None:
        """Reads the bytes from `begin` on into [bytes]: whole blocks where they end up, and checked in passing."""
        end = begin + target.size
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        for block in range(first, last):
            if (block - first) % _AHEAD_BLOCKS == 0 and last - block > _AHEAD_BLOCKS:
                ahead = (block + _AHEAD_BLOCKS) * BLOCK_BYTES
                self._file.opened().expect(self._offset + ahead, _AHEAD_BLOCKS * BLOCK_BYTES)
            low, high = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self._nbytes)
            part = target[max(low - begin, 0) : high - begin]
            if not self._unchecked[block]:
                self._file.opened().read_into(part, self._offset + max(low, begin))
            elif part.size == high - low:
                self._read_block(block, part)
            else:
                whole = np.empty(high - low, BYTE)
                self._read_block(block, whole)
                skip = max(begin - low, 0)
                part[:] = whole[skip : skip + part.size]

    def _read_block(self, block: int, target: Array) -> None:
        self._file.opened().read_into(target, self._offset + block * BLOCK_BYTES)
        if crc32(target.data) != self._file.crcs()[self._first_block + block]:
            raise DamagedError(
                f"{self._file.path}: array {self.name!r} is damaged in block {block} of {self._num_blocks} "
                f"(blocks of {BLOCK_BYTES:,} bytes): its checksum differs",
                RESTORE,
            )
        self._unchecked[block] = 0
        self._all_checked = 1 not in self._unchecked


class OpenArrays(OpenFile):
    """The open file, and the table of its checksums once it was needed."""

    __slots__ = ("checksums",)

    def __init__(self, path: Path):
        super().__init__(path)
        self.checksums: Array | None = None

    def read_user_block(self) -> UserBlock:
        """Raises HeaderError if it is damaged, or the file is longer or shorter than it says."""
        block = parse_user_block(self.read_front())
        if self.num_bytes != block.file_bytes:
            raise HeaderError(f"is {self.num_bytes:,} bytes long, where {block.file_bytes:,} were written")
        if not USER_BLOCK_BYTES <= block.header_bytes <= self.num_bytes:
            raise HeaderError("has a damaged user block")
        return block

    def read_front(self) -> bytes:
        """The bytes of the user block."""
        return self.read(0, min(self.num_bytes, USER_BLOCK_BYTES)).tobytes()

    def read_checksums(self, header: Header) -> Array:
        """Of all blocks. Raises HeaderError if their table is damaged itself."""
        table = header.layout.checksums
        checksums = self.read(table.offset, table.offset + table.nbytes, table.dtype)
        if crc32(checksums.data) != header.block.checksums_crc32:
            raise HeaderError("has a damaged table of checksums")
        return checksums


ArrayFiles = OpenFiles[OpenArrays]
"""Keeps files of arrays open."""
