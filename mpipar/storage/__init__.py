"""Files that are whole or not there: atomic writes, and named arrays in HDF5 with a checksum on every block."""

from __future__ import annotations

from mpipar.storage.arrays import ArrayFile, StoredArray
from mpipar.storage.atomic import (
    atomic_file,
    atomic_folder,
    flush,
    partial_sibling,
    publish_folder,
    remove_folder,
    remove_partials,
)
from mpipar.storage.header import BLOCK_BYTES, Shape
from mpipar.storage.writer import ArrayWriter, Blueprint, Checksums, table_checksum, write_arrays

__all__ = [
    "BLOCK_BYTES",
    "ArrayFile",
    "ArrayWriter",
    "Blueprint",
    "Checksums",
    "Shape",
    "StoredArray",
    "atomic_file",
    "atomic_folder",
    "flush",
    "partial_sibling",
    "publish_folder",
    "remove_folder",
    "remove_partials",
    "table_checksum",
    "write_arrays",
]
