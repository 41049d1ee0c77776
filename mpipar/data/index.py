"""The index of a split: what is to be known of its shards before the first token is read, in one file beside them.

    headers     uint8, a line of JSON for each shard: its header, see `storage.header`
    unigrams    int64 [vocab_size], how often each token occurs in all shards
    attributes  format, version

A run with a thousand shards opens one file at its start instead of a thousand. The index is an extract, never the
truth: one that is not of these files is passed over, and a shard whose header is another is refused when it is opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpipar.errors import DataError
from mpipar.storage import ArrayFile, Header, write_arrays

_FORMAT = "mpipar-index"
_VERSION = 1


@dataclass(frozen=True)
class Inventory:
    """What shards a split has.

    Args:
        headers: Of the shards, in their order.
        unigrams: int64 [vocab_size], how often each token occurs in all of them.
    """

    headers: tuple[Header, ...]
    unigrams: NDArray[np.int64]


def write_index(path: Path, inventory: Inventory) -> None:
    """Writes the index of the shards beside which it will lie.

    Raises:
        DataError: The disk is full, or cannot be written for another reason.
    """
    lines = "".join(json.dumps(header.to_json(), separators=(",", ":")) + "\n" for header in inventory.headers)
    arrays: dict[str, NDArray[Any]] = {
        "headers": np.frombuffer(lines.encode(), np.uint8),
        "unigrams": inventory.unigrams,
    }
    try:
        write_arrays(path, arrays, {"format": _FORMAT, "version": _VERSION})
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def read_index(path: Path, shards: Sequence[Path]) -> Inventory | None:
    """What the index says of these files. None where there is no index, or it is of others.

    Raises:
        DataError: The index is damaged.
    """
    if not path.exists():
        return None
    try:
        with ArrayFile(path) as file:
            if (file.attributes.get("format"), file.attributes.get("version")) != (_FORMAT, _VERSION):
                return None
            lines = file["headers"].array().tobytes().splitlines()
            inventory = Inventory(tuple(Header.from_json(json.loads(line)) for line in lines), file["unigrams"].array())
    except DataError as error:
        raise DataError(f"{error.what}. Delete it: the shards are then opened one by one") from error
    sizes = [header.block.file_bytes for header in inventory.headers]
    return inventory if sizes == [shard.stat().st_size for shard in shards] else None
