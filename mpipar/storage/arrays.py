"""Named arrays in one HDF5 file, written by `pwrite` and read by `pread`, with a CRC-32 for every 256 KiB of each.

A flipped bit is found when its block is first touched. `header` says how the file is laid out, `files` how it is read.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mpipar.errors import DataError
from mpipar.storage.atomic import atomic_file
from mpipar.storage.files import BYTE, OpenFile, OpenFiles
from mpipar.storage.header import (
    BLOCK_BYTES,
    USER_BLOCK_BYTES,
    Attribute,
    Extent,
    Header,
    HeaderError,
    Layout,
    UserBlock,
    lay_out,
    parse,
    parse_user_block,
    user_block,
)

Array = np.ndarray[Any, Any]


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
    """A file of arrays, for reading.

    Args:
        path: A file that `write_arrays` wrote.
        header: Of the file, where it is known already: then the file is opened when it is first read, and has to be
            the one that the header is of.
        files: Keeps it open, with others; by default it stays open until `close`.

    Raises:
        DataError: The file is missing, truncated, damaged in its header, or another program's.
    """

    def __init__(self, path: str | os.PathLike[str], *, header: Header | None = None, files: ArrayFiles | None = None):
        self.path = Path(path)
        self._files: ArrayFiles = OpenFiles(1) if files is None else files
        self._owns_files = files is None
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
        return self._files.get(self)

    def crc32(self, block: int) -> int:
        """What the checksum of a block has to be; blocks are numbered through all arrays."""
        opened = self.opened()
        if opened.checksums is None:
            with self._named():
                opened.checksums = opened.read_checksums(self.header)
        return int(opened.checksums[block])

    def verify(self) -> None:
        """Checks every block of every array. Raises DataError that names the first damaged one."""
        for name in self.names:
            self[name].verify()

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
            header = Header(block, parse(opened.read(USER_BLOCK_BYTES, block.header_bytes).tobytes(), block))
            opened.checksums = opened.read_checksums(header)
        return header

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except HeaderError as error:
            raise DataError(f"{self.path} {error}. Restore it from a copy, or write it again") from error


class StoredArray:
    """One array of a file. `size` counts elements; they are numbered in C order."""

    def __init__(self, file: ArrayFile, extent: Extent, first_block: int):
        self.name, self.shape, self.dtype, self.size = extent.name, extent.shape, extent.dtype, extent.size
        self._file = file
        self._itemsize = extent.dtype.itemsize
        self._block_elements = BLOCK_BYTES // self._itemsize
        self._offset = extent.offset
        self._nbytes = extent.nbytes
        self._first_block = first_block  # among those of all arrays
        self._unchecked = bytearray(b"\1" * extent.num_blocks)  # a byte a block: 1 until its checksum was right

    def read(self, start: int, stop: int) -> Array:
        """Elements start..stop as a new one-dimensional array; blocks that were not touched before are checked.

        Raises:
            DataError: A touched block is damaged, or the file was truncated or replaced meanwhile.
            IndexError: The range is not within the array.
        """
        if not 0 <= start <= stop <= self.size:
            raise IndexError(f"elements {start} to {stop} of array {self.name!r}, which has {self.size}")
        if self._is_checked(start, stop):
            out = np.empty(stop - start, self.dtype)
            self._file.opened().read_into(out, self._offset + start * self._itemsize)
            return out
        begin, end = start * self._itemsize, stop * self._itemsize
        first, last = begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        blocks = self._read_checked(first, last)
        skip = first * BLOCK_BYTES
        part = blocks[begin - skip : end - skip]
        # A copy where it is smaller, so that a short sample does not keep its whole block alive.
        return (part if part.size == blocks.size else part.copy()).view(self.dtype)

    def read_into(self, start: int, out: Array) -> None:
        """Fills a contiguous one-dimensional array with the elements from `start` on, checked as in `read`."""
        stop = start + out.size
        if start >= 0 and stop <= self.size and out.dtype == self.dtype and self._is_checked(start, stop):
            self._file.opened().read_into(out, self._offset + start * self._itemsize)
        else:
            out[:] = self.read(start, stop)

    def array(self) -> Array:
        """The whole array in its shape, checked."""
        return self.read(0, self.size).reshape(self.shape)

    def verify(self) -> None:
        """Checks every block, also those already checked. Raises DataError that names the first damaged one."""
        for block in range(len(self._unchecked)):
            self._unchecked[block] = 1
            self._read_checked(block, block + 1)

    def _is_checked(self, start: int, stop: int) -> bool:
        """Whether the blocks of these elements have been touched before."""
        per_block = self._block_elements
        return self._unchecked.find(1, start // per_block, (stop - 1) // per_block + 1) < 0

    def _read_checked(self, first: int, last: int) -> Array:
        begin, end = first * BLOCK_BYTES, min(last * BLOCK_BYTES, self._nbytes)
        raw = np.empty(end - begin, BYTE)
        self._file.opened().read_into(raw, self._offset + begin)
        for block in range(first, last):
            if self._unchecked[block]:
                at = (block - first) * BLOCK_BYTES
                if zlib.crc32(raw[at : at + BLOCK_BYTES].data) != self._file.crc32(self._first_block + block):
                    raise DataError(
                        f"{self._file.path}: array {self.name!r} is damaged in block {block} of "
                        f"{len(self._unchecked)} (blocks of {BLOCK_BYTES:,} bytes): its checksum differs. Restore the "
                        "file from a copy, or write it again"
                    )
                self._unchecked[block] = 0
        return raw


class OpenArrays(OpenFile):
    """The open file, and the table of its checksums once it was needed."""

    checksums: Array | None = None

    def read_user_block(self) -> UserBlock:
        """Raises HeaderError if it is damaged, or the file is longer or shorter than it says."""
        block = parse_user_block(self.read(0, min(self.num_bytes, USER_BLOCK_BYTES)).tobytes())
        if self.num_bytes != block.file_bytes:
            raise HeaderError(f"is {self.num_bytes:,} bytes long, where {block.file_bytes:,} were written")
        if not USER_BLOCK_BYTES <= block.header_bytes <= self.num_bytes:
            raise HeaderError("has a damaged user block")
        return block

    def read_checksums(self, header: Header) -> Array:
        """Of all blocks. Raises HeaderError if their table is damaged itself."""
        table = header.layout.checksums
        checksums = self.read(table.offset, table.offset + table.nbytes, table.dtype)
        if zlib.crc32(checksums.data) != header.block.checksums_crc32:
            raise HeaderError("has a damaged table of checksums")
        return checksums


ArrayFiles = OpenFiles[OpenArrays]
"""Keeps files of arrays open."""


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
    raw = array.reshape(-1).view(BYTE)
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
