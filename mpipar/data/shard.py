"""One shard of a data set: a file of `storage.arrays` (contiguous, a CRC-32 a block) that describes itself.

    tokens      uint16 or uint32, whichever holds the vocabulary; an end of text after every document
    documents   int64 [num_documents + 1], where each document begins, and where the last one ends
    unigrams    int64 [vocab_size], how often each token occurs
    counted     only where not all tokens count in the loss: uint8 [num_tokens / 8, rounded up], a bit a token, the
                first in the lowest bit of its byte: 1 if it counts when it is predicted
    attributes  format, version; split, index, num_shards (of the split); tokenizer (identity), vocab_size; text_bytes;
                with `counted`, num_counted

Version 1 has no `counted`, version 2 has it.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpipar.data.tokenizer import Tokenizer
from mpipar.errors import DataError
from mpipar.storage import ArrayFile, ArrayFiles, Header, write_arrays

_FORMAT = "mpipar-shard"
_VERSION = 1
_VERSION_COUNTED = 2

_VERIFY_ELEMENTS = 1 << 22


class Shard:
    """One shard, for reading.

    Args:
        path: The file.
        header: Of the file, where it is known already: then it is opened when it is first read.
        files: Keeps it open, together with others; by default it is open until `close`.

    Raises:
        DataError: The file is missing, truncated, damaged, or no shard of a version that is known here.
    """

    def __init__(self, path: Path, header: Header | None = None, files: ArrayFiles | None = None):
        self.path = path
        self._file = ArrayFile(path, header=header, files=files)
        self.header = self._file.header
        try:
            self._describe()
        except BaseException:
            self._file.close()
            raise

    def _describe(self) -> None:
        attributes = self._file.attributes
        if attributes.get("format") != _FORMAT:
            raise DataError(f"{self.path} is not a shard of a data set (its format is {attributes.get('format')!r})")
        if attributes.get("version") not in (_VERSION, _VERSION_COUNTED):
            raise DataError(
                f"{self.path} has version {attributes.get('version')} of the shard format, this mpipar reads versions "
                f"{_VERSION} and {_VERSION_COUNTED}: pack the data set again"
            )
        self.split = str(attributes["split"])
        self.index = int(attributes["index"])
        self.num_shards = int(attributes["num_shards"])
        self.vocab_size = int(attributes["vocab_size"])
        self.tokenizer_id = str(attributes["tokenizer"])
        self.text_bytes = int(attributes["text_bytes"])
        self.tokens = self._file["tokens"]
        self.num_tokens = self.tokens.size
        self._counted = self._file["counted"] if attributes["version"] == _VERSION_COUNTED else None
        self.num_counted = self.num_tokens if self._counted is None else int(attributes["num_counted"])
        self.num_documents = self._file["documents"].size - 1

    def read_documents(self) -> NDArray[np.int64]:
        """Where each document begins, and where the last one ends."""
        return self._file["documents"].array()

    def read_unigrams(self) -> NDArray[np.int64]:
        """How often each token occurs."""
        return self._file["unigrams"].array()

    def read_counted(self, offset: int, length: int) -> NDArray[np.bool_] | bool:
        """Which tokens offset..offset + length count when they are predicted: [length], or True for all."""
        if self._counted is None:
            return True
        first = offset // 8
        bits = np.unpackbits(self._counted.read(first, -(-(offset + length) // 8)), bitorder="little")
        return bits[offset - 8 * first :][:length].astype(np.bool_)

    def verify(self) -> None:
        """Reads all of it. Raises DataError that names the file, and the block if one is damaged."""
        self._file.verify()
        counts = np.zeros(self.vocab_size, np.int64)
        for start in range(0, self.num_tokens, _VERIFY_ELEMENTS):
            tokens = self.tokens.read(start, min(start + _VERIFY_ELEMENTS, self.num_tokens))
            if tokens.max() >= self.vocab_size:
                raise DataError(
                    f"{self.path}: token {tokens.max()} in a vocabulary of {self.vocab_size}: pack it again"
                )
            counts += np.bincount(tokens, minlength=self.vocab_size)
        documents = self.read_documents()
        if documents[0] != 0 or documents[-1] != self.num_tokens or (np.diff(documents) <= 0).any():
            raise DataError(f"{self.path}: the table of documents does not fit the tokens: pack it again")
        if not np.array_equal(counts, self.read_unigrams()):
            raise DataError(f"{self.path}: the frequencies are not those of the tokens: pack it again")
        if self._counted is not None:
            bits = self._counted.array()
            if bits.size != -(-self.num_tokens // 8) or np.bitwise_count(bits).sum() != self.num_counted:
                raise DataError(f"{self.path}: what counts does not fit the tokens: pack it again")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def write_shard(
    folder: Path,
    split: str,
    index: int,
    num_shards: int,
    documents: list[NDArray[np.uint32]],
    made_by: Tokenizer,
    text_bytes: int,
    counted: list[NDArray[np.bool_]] | None = None,
) -> None:
    """Writes a shard of these documents' tokens, each of which ends with an end of text.

    Args:
        folder: Of the data set.
        split: Of it.
        index: Of the shard.
        num_shards: Of the split.
        documents: The tokens.
        made_by: Their tokenizer.
        text_bytes: The size of their text.
        counted: Of each document, which tokens count when they are predicted; None if all do.

    Raises:
        DataError: The disk is full, or cannot be written for another reason.
    """
    dtype = np.uint16 if made_by.vocab_size <= 1 << 16 else np.uint32
    tokens = np.concatenate(documents).astype(dtype)
    path = folder / shard_name(split, index)
    arrays: dict[str, NDArray[Any]] = {
        "tokens": tokens,
        "documents": np.cumsum([0] + [document.size for document in documents], dtype=np.int64),
        "unigrams": np.bincount(tokens, minlength=made_by.vocab_size),
    }
    attributes: dict[str, str | int] = {
        "format": _FORMAT,
        "version": _VERSION,
        "split": split,
        "index": index,
        "num_shards": num_shards,
        "tokenizer": made_by.identity,
        "vocab_size": made_by.vocab_size,
        "text_bytes": text_bytes,
    }
    if counted is not None:
        bits = np.concatenate(counted)
        arrays["counted"] = np.packbits(bits, bitorder="little")
        attributes |= {"version": _VERSION_COUNTED, "num_counted": int(bits.sum())}
    try:
        write_arrays(path, arrays, attributes)
    except OSError as error:
        raise DataError(
            f"cannot write {path.name} ({tokens.nbytes:,} bytes) to {folder.parent}: {error.strerror}"
        ) from error


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}.h5"
