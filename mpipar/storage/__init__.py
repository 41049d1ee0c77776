"""Files that are whole or not there: atomic writes, and named arrays in HDF5 with a checksum on every block."""

from __future__ import annotations

from mpipar.storage.arrays import ArrayFile, ArrayFiles, StoredArray, write_arrays
from mpipar.storage.atomic import atomic_file, atomic_folder, remove_folder, remove_partials
from mpipar.storage.files import OpenFiles, room_for_files
from mpipar.storage.header import BLOCK_BYTES, Header

__all__ = [
    "BLOCK_BYTES",
    "ArrayFile",
    "ArrayFiles",
    "Header",
    "OpenFiles",
    "StoredArray",
    "atomic_file",
    "atomic_folder",
    "remove_folder",
    "remove_partials",
    "room_for_files",
    "write_arrays",
]
