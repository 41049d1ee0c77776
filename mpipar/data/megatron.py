"""Reading tokens that Megatron-LM has prepared: PREFIX.bin and PREFIX.idx, an IndexedDataset or MMapIndexedDataset.

PREFIX.bin holds the tokens of all sequences, one after the other. PREFIX.idx, little-endian:

    "MMIDIDX" and two zero bytes
    uint64      version, 1
    uint8       dtype of the tokens: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6 and 7 are floats)
    uint64      num_sequences
    uint64      num_documents + 1
    int32       [num_sequences]         tokens of each sequence
    int64       [num_sequences]         where it begins, in bytes of PREFIX.bin
    int64       [num_documents + 1]     the first sequence of each document, and the number of sequences

A document is one sequence, or several where sentences were split.

Megatron-LM, megatron/core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpipar.errors import DataError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_AT_ONCE = 1 << 20  # entries of the index


class MegatronTokens:
    """The documents of PREFIX.bin. The index is mapped, and looked at piece by piece: nothing grows with its size.

    Args:
        prefix: What the two files' names begin with.

    Raises:
        DataError: A file is missing, or the two are not what they should be.
    """

    def __init__(self, prefix: str | Path):
        self.index_path = Path(f"{prefix}.idx")
        self.tokens_path = Path(f"{prefix}.bin")
        try:
            with self.index_path.open("rb") as file:
                header = file.read(_HEADER.size)
            index_bytes = self.index_path.stat().st_size
            self.num_bytes = self.tokens_path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{error.filename}: {error.strerror}. PREFIX stands for PREFIX.bin and PREFIX.idx, as Megatron's "
                "preprocess_data.py writes them"
            ) from error
        self.dtype, num_sequences, self.num_documents = self._parse(header)
        expected = _HEADER.size + 12 * num_sequences + 8 * (self.num_documents + 1)
        if index_bytes != expected:
            modes = " (with modes of several media, which are not read here)" * (
                index_bytes == expected + num_sequences
            )
            raise self._bad(f"is {index_bytes:,} bytes long, where its header says {expected:,}{modes}")
        self._num_sequences = num_sequences
        self._lengths = self._map("<i4", _HEADER.size, num_sequences)
        self._begins = self._map("<i8", _HEADER.size + 4 * num_sequences, num_sequences)
        self._first = self._map("<i8", _HEADER.size + 12 * num_sequences, self.num_documents + 1)

    def _parse(self, header: bytes) -> tuple[np.dtype[Any], int, int]:
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise self._bad(f"begins with {header[:9]!r}, and not with {_MAGIC!r}")
        _, version, code, num_sequences, num_entries = _HEADER.unpack(header)
        if version != 1:
            raise self._bad(f"has version {version}, where 1 is known")
        if code not in _DTYPES:
            raise self._bad(f"has tokens of dtype {code}, where {', '.join(map(str, _DTYPES))} are known")
        if num_entries == 0 or num_sequences == 0:
            raise self._bad("holds no documents")
        return np.dtype(_DTYPES[code]), num_sequences, num_entries - 1

    def check(self) -> None:
        """Reads all of the index, and compares it with the size of the tokens.

        Raises:
            DataError: They do not fit: a file is truncated or damaged, or of another data set.
        """
        end = 0
        for start in range(0, self._num_sequences, _AT_ONCE):
            lengths = self._lengths[start : start + _AT_ONCE].astype(np.int64)
            if (lengths < 0).any():
                raise self._bad("has a sequence of negative length")
            ends = end + np.cumsum(lengths * self.dtype.itemsize)
            begins = np.concatenate([[end], ends[:-1]])
            wrong = np.flatnonzero(begins != self._begins[start : start + _AT_ONCE])
            if wrong.size:
                raise self._bad(f"has sequence {start + wrong[0]:,} not where the one before ends")
            end = int(ends[-1])
        if end != self.num_bytes:
            raise DataError(
                f"{self.tokens_path} is {self.num_bytes:,} bytes long, where {self.index_path.name} says {end:,}: it "
                "was truncated, or the two are not of one data set. Copy them again"
            )
        before = 0
        for start in range(0, self.num_documents + 1, _AT_ONCE):
            first = np.concatenate([[before], self._first[start : start + _AT_ONCE]])
            if (np.diff(first) < 0).any():
                raise self._bad("has documents that are not in order")
            before = int(first[-1])
        if self._first[0] != 0 or before != self._num_sequences:
            raise self._bad(f"has documents of {before:,} sequences, where there are {self._num_sequences:,}")

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Documents start..stop: their tokens, and where in these each begins, and the last one ends.

        Raises:
            DataError: They cannot be read.
        """
        begins = self._first[start : stop + 1]
        ends = np.where(begins < self._num_sequences, self._begins[np.minimum(begins, self._num_sequences - 1)], -1)
        bounds = np.where(ends < 0, self.num_bytes, ends) // self.dtype.itemsize
        try:
            with self.tokens_path.open("rb") as file:
                offset = int(bounds[0]) * self.dtype.itemsize
                tokens = np.fromfile(file, self.dtype, int(bounds[-1] - bounds[0]), offset=offset)
        except OSError as error:
            raise DataError(f"{self.tokens_path}: cannot be read: {error.strerror}") from error
        if tokens.size != bounds[-1] - bounds[0]:
            raise DataError(f"{self.tokens_path} ends before document {stop:,}: it was truncated meanwhile")
        return tokens, (bounds - bounds[0]).astype(np.int64)

    def _map(self, dtype: str, offset: int, size: int) -> NDArray[Any]:
        return np.memmap(self.index_path, dtype=dtype, mode="r", offset=offset, shape=(size,))

    def _bad(self, what: str) -> DataError:
        return DataError(f"{self.index_path} {what}: it is no index of Megatron's IndexedDataset, or damaged")
