"""Named arrays in one HDF5 file, written by `pwrite` and read by `pread`, with a CRC-32 for every 256 KiB of each.

A read costs what a memory map costs, but a file that was truncated is an error and not a SIGBUS, and a flipped bit is
found when its block is first touched. `header` says how the file is laid out. Readers need no lock and share no file
position; a process that forks may read on both sides.
"""

from __future__ import annotations

import errno
import io
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mpipar.errors import DataError
from mpipar.storage.atomic import atomic_file
from mpipar.storage.header import (
    BLOCK_BYTES,
    USER_BLOCK_BYTES,
    Attribute,
    Extent,
    HeaderError,
    Layout,
    lay_out,
    parse,
    parse_user_block,
    user_block,
)

Array = np.ndarray[Any, Any]

_BYTE = np.dtype(np.uint8)


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, Array], attributes: Mapping[str, Attribute] | None = None
) -> None:
    """Writes the file as a whole, in place of what is at `path`, and flushes it to the disk.

    Args:
        path: Where the file will be.
        arrays: Booleans and numbers of any shape, by name; a "/" in a name makes an HDF5 group.
        attributes: Strings, integers and floats that belong to the file as a whole.

    Raises:
        OSError: The file cannot be written; ENOSPC for a full disk. `path` is as it was.
        ValueError: A name or dtype that cannot be stored.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    layout, metadata = lay_out(arrays, attributes or {})
    try:
        with atomic_file(path) as partial:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write(descriptor, layout, metadata, arrays)
            finally:
                os.close(descriptor)
    except OSError as error:  # which names the hidden file, or none
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


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
        size = os.fstat(self._stream.fileno()).st_size
        try:
            block = parse_user_block(_pread(self._stream, self.path, 0, min(size, USER_BLOCK_BYTES)).tobytes())
            if size != block.file_bytes:
                raise HeaderError(f"is {size:,} bytes long, where {block.file_bytes:,} were written")
            if not USER_BLOCK_BYTES <= block.header_bytes <= size:
                raise HeaderError("has a damaged user block")
            metadata = _pread(self._stream, self.path, USER_BLOCK_BYTES, block.header_bytes)
            layout = parse(metadata.tobytes(), block)
            table = layout.checksums
            checksums = _pread(self._stream, self.path, table.offset, table.offset + table.nbytes)
            if zlib.crc32(checksums.data) != block.checksums_crc32:
                raise HeaderError("has a damaged table of checksums")
        except HeaderError as error:
            raise DataError(f"{self.path} {error}. Restore it from a copy, or write it again") from error
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
        """Checks every block of every array. Raises DataError that names the first damaged one."""
        for array in self._arrays.values():
            array.verify()

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
        self._stream = stream
        self._path = path
        self._offset = extent.offset
        self._nbytes = extent.nbytes
        self._crcs = crcs
        self._unchecked = bytearray(b"\1" * extent.num_blocks)  # a byte a block: 1 until its checksum was right

    def read(self, start: int, stop: int) -> Array:
        """Elements start..stop as a new one-dimensional array; blocks that were not touched before are checked.

        Raises:
            DataError: A touched block is damaged, or the file was truncated meanwhile.
            IndexError: The range is not within the array.
        """
        if not 0 <= start <= stop <= self.size:
            raise IndexError(f"elements {start} to {stop} of array {self.name!r}, which has {self.size}")
        begin, end = start * self.dtype.itemsize, stop * self.dtype.itemsize
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        if self._unchecked.find(1, first, last) < 0:
            return _pread(self._stream, self._path, self._offset + begin, self._offset + end, self.dtype)
        blocks = self._read_checked(first, last)
        skip = first * BLOCK_BYTES
        part = blocks[begin - skip : end - skip]
        # A copy where it is smaller, so that a short sample does not keep its whole block alive.
        return (part if part.size == blocks.size else part.copy()).view(self.dtype)

    def array(self) -> Array:
        """The whole array in its shape, checked."""
        return self.read(0, self.size).reshape(self.shape)

    def verify(self) -> None:
        """Checks every block, also those already checked. Raises DataError that names the first damaged one."""
        for block in range(len(self._unchecked)):
            self._unchecked[block] = 1
            self._read_checked(block, block + 1)

    def _read_checked(self, first: int, last: int) -> Array:
        begin, end = first * BLOCK_BYTES, min(last * BLOCK_BYTES, self._nbytes)
        raw = _pread(self._stream, self._path, self._offset + begin, self._offset + end)
        for block in range(first, last):
            if self._unchecked[block]:
                at = (block - first) * BLOCK_BYTES
                if zlib.crc32(raw[at : at + BLOCK_BYTES].data) != self._crcs[block]:
                    raise DataError(
                        f"{self._path}: array {self.name!r} is damaged in block {block} of {len(self._unchecked)} "
                        f"(blocks of {BLOCK_BYTES:,} bytes): its checksum differs. Restore the file from a copy, or "
                        f"write it again"
                    )
                self._unchecked[block] = 0
        return raw


def _pread(stream: io.FileIO, path: Path, begin: int, end: int, dtype: np.dtype[Any] = _BYTE) -> Array:
    """Bytes begin..end of the file as a new one-dimensional array."""
    array = np.empty((end - begin) // dtype.itemsize, dtype=dtype)
    missing = array
    while begin < end:
        try:
            count = os.preadv(stream.fileno(), [missing.data], begin)
        except OSError as error:
            raise DataError(f"{path}: cannot be read at byte {begin:,}: {error.strerror}") from error
        if count == 0:
            raise DataError(
                f"{path}: ends at byte {begin:,}, where {end - begin:,} more were expected: it was truncated. Restore "
                f"it from a copy, or write it again"
            )
        begin += count
        if begin < end:
            missing = array.view(_BYTE)[begin - end :]
    return array


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _write(descriptor: int, layout: Layout, metadata: bytes, arrays: Mapping[str, Array]) -> None:
    _reserve(descriptor, layout.file_bytes)
    crcs: list[int] = []
    for extent in layout.extents:
        crcs += _write_blocks(descriptor, extent.offset, arrays[extent.name])
    checksums = np.array(crcs, dtype=np.uint32).tobytes()
    _pwrite(descriptor, checksums, layout.checksums.offset)
    _pwrite(descriptor, user_block(layout, metadata, checksums) + metadata, 0)


def _write_blocks(descriptor: int, offset: int, array: Array) -> list[int]:
    """Writes the array's bytes at `offset` and returns the CRC-32 of each block."""
    raw = array.reshape(-1).view(np.uint8)
    crcs = []
    for begin in range(0, raw.size, BLOCK_BYTES):
        block = raw[begin : begin + BLOCK_BYTES].data
        crcs.append(zlib.crc32(block))
        _pwrite(descriptor, block, offset + begin)
    return crcs


def _reserve(descriptor: int, size: int) -> None:
    """Claims the space of the whole file, so that a disk without room for it says so before anything is written."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # not on macOS
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)
