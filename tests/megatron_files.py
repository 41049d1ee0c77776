"""Megatron's PREFIX.bin and PREFIX.idx, written by the format's description."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16") -> None:
    """Documents of sequences of tokens."""
    sequences = [np.array(sequence, dtype) for document in documents for sequence in document]
    Path(f"{prefix}.bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(documents) + 1)
    lengths = np.array([sequence.size for sequence in sequences], "<i4")
    begins = np.array(list(accumulate((sequence.nbytes for sequence in sequences), initial=0))[:-1], "<i8")
    first = np.array(list(accumulate((len(document) for document in documents), initial=0)), "<i8")
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + begins.tobytes() + first.tobytes())
