"""The index of a checkpoint, index.json: what it holds, where, and checksums that tie its files together.

    {"crc32": "0d4a1185",
     "format": "mpipar-checkpoint", "version": 2, "step": 200,
     "attributes": {...},                                      what else the run keeps
     "texts": {"config.toml": {"bytes": 1931, "crc32": ...}},
     "files": [{"name": "state-0.h5", "bytes": 1493172224}, ...],
     "tensors": {"weights/norm.weight": {"dtype": "float32", "shape": [512], "slices": [
         {"file": 0, "dataset": "weights/norm.weight", "start": [0], "extent": [512], "crc32": ...}, ...]}, ...}}

The first line is the CRC-32 of the bytes behind it. A slice's `crc32` is that of the CRC-32s of its blocks (`storage`),
so the index vouches for the tables of checksums, which vouch for the data. Nothing in it is a path: a checkpoint that
came from elsewhere cannot name a file outside its folder.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpipar.checkpoint.box import Box
from mpipar.checkpoint.dtypes import named

INDEX = "index.json"
_FORMAT = "mpipar-checkpoint"
_VERSION = 2
_FIRST_LINE = b'{"crc32": "%08x",\n'


class IndexFault(Exception):
    """What is wrong with an index, for the reader to say of which checkpoint."""


@dataclass(frozen=True)
class StoredSlice:
    """A box of a tensor, and the data set that holds it.

    Args:
        file: The number of the file.
        dataset: Its name in that.
        box: Which part of the tensor it is.
        crc32: Of the CRC-32s of its blocks.
    """

    file: int
    dataset: str
    box: Box
    crc32: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, and the slices that it is made of.

    Args:
        dtype: Its name in torch.
        shape: Its shape.
        slices: In no order; each element is in one.
    """

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[StoredSlice, ...]


@dataclass(frozen=True)
class Text:
    """A text file beside the tensors.

    Args:
        num_bytes: Its length.
        crc32: Of its bytes.
    """

    num_bytes: int
    crc32: int

    @classmethod
    def of(cls, content: bytes) -> Text:
        return cls(len(content), zlib.crc32(content))


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds.

    Args:
        step: Number of finished steps.
        attributes: What else the run keeps, as JSON.
        texts: Text files, by name.
        file_bytes: Length of each file of tensors.
        tensors: By name.
    """

    step: int
    attributes: dict[str, Any]
    texts: dict[str, Text]
    file_bytes: tuple[int, ...]
    tensors: dict[str, StoredTensor]


def file_name(number: int) -> str:
    """Of a file of tensors."""
    return f"state-{number}.h5"


def encode(index: Index) -> bytes:
    """The bytes of index.json."""
    values = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": index.step,
        "attributes": index.attributes,
        "texts": {name: {"bytes": text.num_bytes, "crc32": text.crc32} for name, text in index.texts.items()},
        "files": [{"name": file_name(i), "bytes": num_bytes} for i, num_bytes in enumerate(index.file_bytes)],
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "slices": [
                    {"file": s.file, "dataset": s.dataset, "start": s.box.start, "extent": s.box.extent}
                    | {"crc32": s.crc32}
                    for s in tensor.slices
                ],
            }
            for name, tensor in index.tensors.items()
        },
    }
    body = json.dumps(values).encode()[1:] + b"\n"
    return _FIRST_LINE % zlib.crc32(body) + body


def decode(content: bytes) -> Index:
    """The index in these bytes. Raises IndexFault if they are damaged, or of another format."""
    first, _, body = content.partition(b"\n")
    if first + b"\n" != _FIRST_LINE % zlib.crc32(body):
        raise IndexFault(f"{INDEX} is damaged: its checksum differs")
    try:
        values = json.loads(b"{" + body)
        kind, version = values["format"], values["version"]
        if (kind, version) != (_FORMAT, _VERSION):
            raise IndexFault(f"is of format {kind!r} version {version!r}; {_FORMAT!r} version {_VERSION} is read here")
        index = Index(
            step=int(values["step"]),
            attributes=dict(values["attributes"]),
            texts={name: Text(text["bytes"], text["crc32"]) for name, text in values["texts"].items()},
            file_bytes=tuple(int(file["bytes"]) for file in values["files"]),
            tensors={name: _tensor(fields) for name, fields in values["tensors"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexFault(f"{INDEX} is not what this program writes ({error!r})") from error
    _check(index)
    return index


def _tensor(fields: Mapping[str, Any]) -> StoredTensor:
    slices = (
        StoredSlice(s["file"], s["dataset"], Box(tuple(s["start"]), tuple(s["extent"])), s["crc32"])
        for s in fields["slices"]
    )
    return StoredTensor(fields["dtype"], tuple(fields["shape"]), tuple(slices))


def _check(index: Index) -> None:
    """Raises IndexFault for what no writer writes: slices that are no part of their tensor, names that are paths."""
    for name in index.texts:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise IndexFault(f"{INDEX} names a file {name!r}, which is no plain name")
    for name, tensor in index.tensors.items():
        named(tensor.dtype)
        inside = all(s.box.fits(tensor.shape) and 0 <= s.file < len(index.file_bytes) for s in tensor.slices)
        if not inside or sum(s.box.size for s in tensor.slices) != math.prod(tensor.shape):
            raise IndexFault(f"{INDEX} has slices of {name!r} that do not make up a tensor of {list(tensor.shape)}")
