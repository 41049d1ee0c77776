"""Files that are whole or not there: atomic writes, and named arrays in HDF5 with a checksum on every block."""

from __future__ import annotations

from mpipar.storage.arrays import ArrayFile, ArrayFiles, StoredArray
from mpipar.storage.atomic import (
    atomic_file,
    atomic_folder,
    flush,
    partial_folder,
    publish_folder,
    put_in_place,
    remove_folder,
    remove_partials,
)
from mpipar.storage.files import OpenFiles, room_for_files
from mpipar.storage.header import BLOCK_BYTES, Header, Shape
from mpipar.storage.lock import FileLock
from mpipar.storage.writer import ArrayWriter, Blueprint, Checksums, table_checksum, write_arrays

__all__ = [
    "BLOCK_BYTES",
    "ArrayFile",
    "ArrayFiles",
    "ArrayWriter",
    "Blueprint",
    "Checksums",
    "FileLock",
    "Header",
    "OpenFiles",
    "Shape",
    "StoredArray",
    "atomic_file",
    "atomic_folder",
    "flush",
    "partial_folder",
    "publish_folder",
    "put_in_place",
    "remove_folder",
    "remove_partials",
    "room_for_files",
    "table_checksum",
    "write_arrays",
]
