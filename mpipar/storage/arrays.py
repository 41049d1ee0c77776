"""Reading named arrays from one HDF5 file, by `pread`, with a CRC-32 for every 256 KiB of each; `writer` writes them.

A read costs what a memory map costs, but a file that was truncated is an error and not a SIGBUS, and a flipped bit is
found when its block is first touched. `header` says how the file is laid out. Readers need no lock and share no file
position; a process that forks may read on both sides.
"""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mpipar.errors import DataError
from mpipar.storage.header import (
    BLOCK_BYTES,
    USER_BLOCK_BYTES,
    Extent,
    HeaderError,
    parse,
    parse_user_block,
    user_block,
)

Array = np.ndarray[Any, Any]

_AHEAD_BLOCKS = 16  # that a long read asks the system to fetch while it checks those before


class ArrayFile:
    """A file of arrays that was opened for reading.

    Args:
        path: A file that `write_arrays` wrote.

    Raises:
        DataError: The file is missing, truncated, damaged in its header, or another program's.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self._stream = io.FileIO(path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be opened: {error.strerror}") from error
        try:
            self._read_header()
        except BaseException:
            self._stream.close()
            raise

    def _read_header(self) -> None:
        self._size = size = os.fstat(self._stream.fileno()).st_size
        try:
            front = self._read(0, min(size, USER_BLOCK_BYTES)).tobytes()
            block = parse_user_block(front)
            if size != block.file_bytes:
                raise HeaderError(f"is {size:,} bytes long, where {block.file_bytes:,} were written")
            if not USER_BLOCK_BYTES <= block.header_bytes <= size:
                raise HeaderError("has a damaged user block")
            metadata = self._read(USER_BLOCK_BYTES, block.header_bytes).tobytes()
            self._layout = layout = parse(metadata, block)
            table = layout.checksums
            checksums = self._read(table.offset, table.offset + table.nbytes)
            if zlib.crc32(checksums.data) != block.checksums_crc32:
                raise HeaderError("has a damaged table of checksums")
            if front != user_block(layout, metadata, checksums.tobytes()):
                raise HeaderError("has a damaged user block")
        except HeaderError as error:
            raise DataError(f"{self.path} {error}. Restore it from a copy, or write it again") from error
        self._header_bytes = block.header_bytes
        self.attributes = layout.attributes
        self.names = tuple(extent.name for extent in layout.extents)
        self._arrays: dict[str, StoredArray] = {}
        crcs = checksums.view(table.dtype)
        for extent in layout.extents:
            own, crcs = crcs[: extent.num_blocks], crcs[extent.num_blocks :]
            self._arrays[extent.name] = StoredArray(self._stream, self.path, extent, own)

    def __getitem__(self, name: str) -> StoredArray:
        try:
            return self._arrays[name]
        except KeyError:
            raise DataError(f"{self.path}: has no array {name!r}; it has {', '.join(self.names) or 'none'}") from None

    def verify(self) -> None:
        """Checks every byte of the file: every block of every array, and that nothing was put between them.

        Raises:
            DataError: Names the first damage.
        """
        for array in self._arrays.values():
            array.verify()
        end = self._header_bytes
        extents = [extent for extent in (*self._layout.extents, self._layout.checksums) if extent.size]
        bounds = sorted((extent.offset, extent.offset + extent.nbytes) for extent in extents)
        for begin, following in [*bounds, (self._size, self._size)]:
            if self._read(end, begin).any():
                raise DataError(f"{self.path}: is damaged between bytes {end:,} and {begin:,}, which should be zeros")
            end = following

    def _read(self, begin: int, end: int) -> Array:
        raw = np.empty(max(0, end - begin), np.uint8)
        _pread(self._stream, self.path, begin, raw)
        return raw

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class StoredArray:
    """One array of an open file. `size` counts elements; they are numbered in C order."""

    def __init__(self, stream: io.FileIO, path: Path, extent: Extent, crcs: Array):
        self.name, self.shape, self.dtype, self.size = extent.name, extent.shape, extent.dtype, extent.size
        self.crcs = crcs  # [blocks]
        self._stream = stream
        self._path = path
        self._offset = extent.offset
        self._nbytes = extent.nbytes
        self._unchecked = bytearray(b"\1" * extent.num_blocks)  # a byte a block: 1 until its checksum was right

    def read(self, start: int, stop: int) -> Array:
        """Elements start..stop as a new one-dimensional array; blocks that were not touched before are checked.

        Raises:
            DataError: A touched block is damaged, or the file was truncated meanwhile.
            IndexError: The range is not within the array.
        """
        self._require(start, stop)
        array = np.empty(stop - start, self.dtype)
        self._fill(start * self.dtype.itemsize, array.view(np.uint8))
        return array

    def read_into(self, start: int, array: Array) -> None:
        """Like `read`, into an array of this dtype that lies in one piece: from element `start` on, as many as fit."""
        assert array.dtype == self.dtype and array.flags.c_contiguous
        self._require(start, start + array.size)
        self._fill(start * self.dtype.itemsize, array.reshape(-1).view(np.uint8))

    def array(self) -> Array:
        """The whole array in its shape, checked."""
        return self.read(0, self.size).reshape(self.shape)

    def verify(self) -> None:
        """Checks every block, also those already checked. Raises DataError that names the first damaged one."""
        self._unchecked = bytearray(b"\1" * len(self._unchecked))
        raw = np.empty(BLOCK_BYTES, np.uint8)
        for begin in range(0, self._nbytes, BLOCK_BYTES):
            self._fill(begin, raw[: self._nbytes - begin])

    def _require(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.size:
            raise IndexError(f"elements {start} to {stop} of array {self.name!r}, which has {self.size}")

    def _fill(self, begin: int, target: Array) -> None:
        """Reads the bytes from `begin` on into [bytes]: whole blocks where they end up, and checked in passing."""
        end = begin + target.size
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        if self._unchecked.find(1, first, last) < 0:
            _pread(self._stream, self._path, self._offset + begin, target)
            return
        for block in range(first, last):
            if (block - first) % _AHEAD_BLOCKS == 0 and last - block > _AHEAD_BLOCKS:
                self._fetch(block + _AHEAD_BLOCKS)
            low, high = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self._nbytes)
            part = target[max(low - begin, 0) : high - begin]
            if not self._unchecked[block]:
                _pread(self._stream, self._path, self._offset + max(low, begin), part)
            elif part.size == high - low:
                self._read_block(block, part)
            else:
                whole = np.empty(high - low, np.uint8)
                self._read_block(block, whole)
                skip = max(begin - low, 0)
                part[:] = whole[skip : skip + part.size]

    def _read_block(self, block: int, target: Array) -> None:
        _pread(self._stream, self._path, self._offset + block * BLOCK_BYTES, target)
        if zlib.crc32(target.data) != self.crcs[block]:
            raise DataError(
                f"{self._path}: array {self.name!r} is damaged in block {block} of {len(self._unchecked)} "
                f"(blocks of {BLOCK_BYTES:,} bytes): its checksum differs. Restore the file from a copy, or "
                f"write it again"
            )
        self._unchecked[block] = 0

    def _fetch(self, block: int) -> None:
        """Asks for the blocks from this one on, which are needed soon."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            where = self._offset + block * BLOCK_BYTES
            os.posix_fadvise(self._stream.fileno(), where, _AHEAD_BLOCKS * BLOCK_BYTES, os.POSIX_FADV_WILLNEED)


def _pread(stream: io.FileIO, path: Path, begin: int, target: Array) -> None:
    """Fills [bytes] with those of the file from `begin` on."""
    missing = target.data
    while missing:
        try:
            count = os.preadv(stream.fileno(), [missing], begin)
        except OSError as error:
            raise DataError(f"{path}: cannot be read at byte {begin:,}: {error.strerror}") from error
        if count == 0:
            raise DataError(
                f"{path}: ends at byte {begin:,}, where {len(missing):,} more were expected: it was truncated. Restore "
                f"it from a copy, or write it again"
            )
        missing, begin = missing[count:], begin + count
