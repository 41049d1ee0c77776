"""Writing a file of arrays, by one process or by several that have no need to talk to each other.

    every writer        computes the same layout, from names, shapes and dtypes
    one of them         reserves the space of the whole file
    every writer        writes its blocks where they belong, by `pwrite`, and keeps their CRC-32
    one of them         is given all CRC-32, and seals the file: the table of checksums, the header, the user block

What is not sealed is no file of arrays to any reader.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mpipar.storage.advice import will_not_be_read
from mpipar.storage.atomic import atomic_file
from mpipar.storage.checksum import crc32
from mpipar.storage.header import BLOCK_BYTES, Attribute, Layout, Shape, lay_out, user_block

Array = np.ndarray[Any, Any]
_HURRIED_BYTES = 8 << 20
_NOTHING = (sys.maxsize, 0)

Checksums = npt.NDArray[np.uint32]
"""[blocks], of all arrays in the order of their sorted names."""


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
    blueprint = Blueprint({name: (array.shape, array.dtype) for name, array in arrays.items()}, attributes or {})
    try:
        with atomic_file(path) as partial, ArrayWriter(partial, blueprint) as writer:
            writer.reserve()
            crcs = [writer.write(name, 0, arrays[name].reshape(-1).view(np.uint8).data) for name in sorted(arrays)]
            writer.seal(np.concatenate([np.empty(0, np.uint32), *crcs]))
    except OSError as error:  # which names the hidden file, or none
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


class Blueprint:
    """Where in a file everything goes: the same in every process that asks.

    Args:
        shapes: Shape and dtype of each array, by name.
        attributes: Of the file as a whole.

    Raises:
        ValueError: A name or dtype that cannot be stored.
    """

    def __init__(self, shapes: Mapping[str, Shape], attributes: Mapping[str, Attribute]):
        self.layout: Layout
        self.layout, self.metadata = lay_out(shapes, attributes)
        self.extents = {extent.name: extent for extent in self.layout.extents}
        self.num_blocks = sum(extent.num_blocks for extent in self.layout.extents)
        ends = np.cumsum([extent.num_blocks for extent in self.layout.extents], dtype=np.int64).tolist()
        starts = [0, *ends]
        self._blocks = {name: slice(*bounds) for name, *bounds in zip(self.extents, starts, ends, strict=False)}

    @property
    def file_bytes(self) -> int:
        return self.layout.file_bytes

    def blocks(self, name: str) -> slice:
        """Which of the checksums are those of an array."""
        return self._blocks[name]


class ArrayWriter:
    """One writer of a file. It creates the file if no other has.

    Args:
        path: The file, under the name that it has until it is whole.
        blueprint: Of the file.
    """

    def __init__(self, path: Path, blueprint: Blueprint):
        self._blueprint = blueprint
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._waiting = _NOTHING  # (first byte, behind the last) of what the disk was not told to write

    def reserve(self) -> None:
        """Claims the space of the whole file, so that a disk without room for it says so before much is written.

        If there is no room the file is emptied at once, for others to have what is left.
        """
        size = self._blueprint.file_bytes
        try:
            os.posix_fallocate(self._descriptor, 0, size)
        except AttributeError:  # not on macOS
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                os.ftruncate(self._descriptor, 0)
                raise
            os.ftruncate(self._descriptor, size)

    def write(self, name: str, begin: int, data: memoryview) -> Checksums:
        """Writes bytes of an array, from its byte `begin`, which begins a block; returns the CRC-32 of each block."""
        assert begin % BLOCK_BYTES == 0
        at = self._blueprint.extents[name].offset + begin
        crcs = np.empty(-(-len(data) // BLOCK_BYTES), np.uint32)
        for i in range(len(crcs)):
            block = data[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]
            crcs[i] = crc32(block)
            _pwrite(self._descriptor, block, at + i * BLOCK_BYTES)
            self._hurry(at + i * BLOCK_BYTES, len(block))
        return crcs

    def _hurry(self, begin: int, num_bytes: int) -> None:
        """Has the disk begin with what was written, when that is worth a call."""
        low, high = self._waiting
        self._waiting = low, high = min(low, begin), max(high, begin + num_bytes)
        if high - low >= _HURRIED_BYTES:
            will_not_be_read(self._descriptor, low, high - low)
            self._waiting = _NOTHING

    def flush(self) -> None:
        """What was written survives a loss of power."""
        os.fsync(self._descriptor)

    def seal(self, crcs: Checksums) -> None:
        """Makes the file valid: its user block is what is written last.

        Args:
            crcs: Of all blocks.
        """
        layout, metadata = self._blueprint.layout, self._blueprint.metadata
        assert len(crcs) == self._blueprint.num_blocks
        checksums = crcs.astype("<u4").tobytes()
        _pwrite(self._descriptor, checksums, layout.checksums.offset)
        _pwrite(self._descriptor, user_block(layout, metadata, checksums) + metadata, 0)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def table_checksum(crcs: Sequence[int] | Checksums) -> int:
    """One number for the CRC-32 of several blocks: the CRC-32 of those, as little-endian words."""
    return crc32(np.asarray(crcs, dtype="<u4").tobytes())


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
