"""The header of a file of arrays: laid out and parsed in memory, so that the HDF5 library never touches the disk.

The file is HDF5 with a user block, which any HDF5 tool opens:

    0 ............ 512              user block: one JSON object with the sizes and checksums that guard the rest
    512 .......... header_bytes     HDF5 metadata: the attributes, and the name, dtype, shape and offset of each array
    header_bytes . file_bytes       the bytes of the arrays, each contiguous; among them `block_crc32`, the CRC-32 of
                                    every 256 KiB block of every other array, in the order of their sorted names

Two things follow from giving HDF5 a file in memory that has a hole where the arrays belong. A full disk meets our own
`pwrite`, which reports it, and not a flush inside the library, which cannot be undone. And damaged metadata is found by
a checksum before a parser written for sound files sees it.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import h5py
import numpy as np

from mpipar.storage.checksum import crc32

BLOCK_BYTES = 256 * 1024
USER_BLOCK_BYTES = 512

_CHECKSUMS = "block_crc32"
_FORMAT = "mpipar-arrays"
_VERSION = 1
_ALIGNED = {"alignment_threshold": USER_BLOCK_BYTES, "alignment_interval": USER_BLOCK_BYTES}
_MAX_ATTRIBUTE_BYTES = 64_000  # the oldest format of HDF5 ends at 64 KiB, header of the attribute included

Attribute = str | int | float
Shape = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape and dtype of an array."""


class HeaderError(Exception):
    """What is wrong with a header, for the reader to say of which file."""


@dataclass(frozen=True)
class Extent:
    """Where the bytes of one array lie in the file; `offset` means nothing for an array without elements."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def num_blocks(self) -> int:
        return -(-self.nbytes // BLOCK_BYTES)


@dataclass(frozen=True)
class Layout:
    """All that a header says: the attributes, the arrays by sorted name, the table of their checksums, the size."""

    attributes: dict[str, Attribute]
    extents: tuple[Extent, ...]
    checksums: Extent
    file_bytes: int


def lay_out(shapes: Mapping[str, Shape], attributes: Mapping[str, Attribute]) -> tuple[Layout, bytes]:
    """The layout of a file of such arrays, and its metadata: the bytes from the user block to the first array."""
    names = sorted(shapes)
    num_blocks = sum(Extent(name, dtype, shape, 0).num_blocks for name, (shape, dtype) in shapes.items())
    image = _Image(b"", 0)
    # HDF5's oldest format keeps no times: the same arrays give the same bits.
    with h5py.File(image, "w", libver=("earliest", "v110"), userblock_size=USER_BLOCK_BYTES, **_ALIGNED) as file:
        for key, value in attributes.items():
            file.attrs[key] = _encode(key, value)
        for name in names:
            _create(file, name, *shapes[name])
        _create(file, _CHECKSUMS, (num_blocks,), np.dtype(np.uint32))
    # Allocated as it is created, an array would lie between the metadata of its neighbours. Allocated afterwards, by
    # a file opened anew, which knows of no free space, all of them lie behind all of the metadata.
    image.freeze()
    with h5py.File(image, "r+", **_ALIGNED) as file:
        extents = [_allocate(file.id, name) for name in (*names, _CHECKSUMS)]
    metadata = image.metadata()
    layout = Layout(dict(attributes), tuple(extents[:-1]), extents[-1], image.file_bytes)
    first = min((extent.offset for extent in extents if extent.size), default=image.file_bytes)
    assert first >= USER_BLOCK_BYTES + len(metadata), "HDF5 put an array among the metadata"
    return layout, metadata


def _allocate(file: h5py.h5f.FileID, name: str) -> Extent:
    """Gives an array its place, by writing one element; by h5py's lower level, which takes a third of the time."""
    dataset = h5py.h5d.open(file, name.encode())
    shape, dtype = dataset.shape, dataset.dtype
    if 0 in shape:  # HDF5 gives an array without elements no place
        return Extent(name, dtype, shape, 0)
    first, element = dataset.get_space(), np.zeros((1,) * len(shape), dtype)
    if shape:
        first.select_hyperslab((0,) * len(shape), element.shape)
    dataset.write(h5py.h5s.create_simple(element.shape) if shape else h5py.h5s.ALL, first, element)
    return Extent(name, dtype, shape, dataset.get_offset())


def user_block(layout: Layout, metadata: bytes, checksums: bytes) -> bytes:
    """The first bytes of the file: written last, they make it valid."""
    fields = {
        "format": _FORMAT,
        "version": _VERSION,
        "header_bytes": USER_BLOCK_BYTES + len(metadata),
        "header_crc32": crc32(metadata),
        "checksums_crc32": crc32(checksums),
        "file_bytes": layout.file_bytes,
    }
    return json.dumps(fields, separators=(",", ":")).encode().ljust(USER_BLOCK_BYTES, b"\0")


@dataclass(frozen=True)
class UserBlock:
    """The user block's fields that a reader needs."""

    header_bytes: int
    header_crc32: int
    checksums_crc32: int
    file_bytes: int


@dataclass(frozen=True)
class Header:
    """All that has to be known of a file to read its arrays. It can be kept elsewhere, which spares the parsing.

    The user block has a checksum of everything else that describes the file, and so says whether this is still it.
    """

    block: UserBlock
    layout: Layout

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        layout = self.layout
        extents = [
            [extent.name, extent.dtype.str, extent.shape, extent.offset]
            for extent in (*layout.extents, layout.checksums)
        ]
        return {"block": asdict(self.block), "attributes": layout.attributes, "arrays": extents}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Header:
        """What `to_json` has made."""
        *extents, checksums = (
            Extent(name, np.dtype(dtype), tuple(shape), offset) for name, dtype, shape, offset in fields["arrays"]
        )
        block = UserBlock(**fields["block"])
        return cls(block, Layout(dict(fields["attributes"]), tuple(extents), checksums, block.file_bytes))


def parse_user_block(block: bytes) -> UserBlock:
    """Raises HeaderError for bytes that are not the user block of a file of this format and version."""
    try:
        fields = json.loads(block.rstrip(b"\0"))
        kind, version = fields.pop("format"), fields.pop("version")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise HeaderError("is not a file of arrays that mpipar wrote, or its first bytes are damaged") from None
    if kind != _FORMAT or version != _VERSION:
        raise HeaderError(f"has format {kind!r} version {version!r}, where {_FORMAT!r} version {_VERSION} is read here")
    try:
        return UserBlock(**{name: int(value) for name, value in fields.items()})
    except (TypeError, ValueError):
        raise HeaderError("has a damaged user block") from None


def parse(metadata: bytes, block: UserBlock) -> Layout:
    """The layout that the metadata describes. Raises HeaderError if it is not what the user block promises."""
    if crc32(metadata) != block.header_crc32:
        raise HeaderError("has a damaged header (its checksum differs)")
    try:
        return _parse_metadata(metadata, block.file_bytes)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise HeaderError(f"has a header that HDF5 does not parse ({error})") from error


def _parse_metadata(metadata: bytes, file_bytes: int) -> Layout:
    extents: dict[str, Extent] = {}

    with h5py.File(_Image(metadata, file_bytes), "r") as file:

        def visit(raw: bytes) -> None:
            item = h5py.h5o.open(file.id, raw)
            if isinstance(item, h5py.h5d.DatasetID):
                # HDF5 gives an array without elements no place; what it answers then is not an offset.
                name, offset = raw.decode(), 0 if 0 in item.shape else item.get_offset()
                extents[name] = Extent(name, item.dtype, item.shape, offset)

        attributes = {key: _decode(value) for key, value in file.attrs.items()}
        h5py.h5o.visit(file.id, visit)
    checksums = extents.pop(_CHECKSUMS)
    return Layout(attributes, tuple(extents[name] for name in sorted(extents)), checksums, file_bytes)


def _create(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    parts = name.split("/")
    if name in file or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{name!r} cannot be the name of an array")
    if dtype.kind not in "biufc":
        raise ValueError(f"array {name!r} has dtype {dtype}, where booleans and numbers can be stored")
    try:
        file.create_dataset(name, shape=shape, dtype=dtype, **({"fill_time": "never"} if shape else {}))
    except TypeError:
        raise ValueError(f"array {name!r} would lie in a group that has the name of another array") from None


def _encode(key: str, value: Attribute) -> Any:
    if not isinstance(value, str):
        return value
    # Of fixed length: strings of variable length would be put into a heap among the arrays.
    encoded = value.encode()
    if b"\0" in encoded:
        raise ValueError(f"attribute {key!r} holds a NUL character, which HDF5 strings end at")
    if len(encoded) > _MAX_ATTRIBUTE_BYTES:
        raise ValueError(f"attribute {key!r} has {len(encoded):,} bytes, where {_MAX_ATTRIBUTE_BYTES:,} can be stored")
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(1, len(encoded))))


def _decode(value: Any) -> Attribute:
    plain = value.item() if isinstance(value, np.generic) else value
    return plain.decode() if isinstance(plain, bytes) else plain


class _Image(io.RawIOBase):
    """A file in memory whose front is there and whose rest is a hole, which reads as zeros and swallows writes."""

    def __init__(self, metadata: bytes, file_bytes: int):
        self.file_bytes = file_bytes
        self._front = bytearray(USER_BLOCK_BYTES) + metadata
        self._frozen_bytes: int | None = None
        self._position = 0

    def freeze(self) -> None:
        """From now on the front is as long as the file is, and what is written behind it is dropped."""
        self._frozen_bytes = self.file_bytes

    def metadata(self) -> bytes:
        return bytes(self._front[USER_BLOCK_BYTES:])

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.file_bytes)[whence]
        return self._position

    def truncate(self, size: int | None = None) -> int:
        self.file_bytes = self._position if size is None else size
        return self.file_bytes

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stored = self._front[self._position : self._position + len(view)]
        view[:] = stored.ljust(len(view), b"\0")
        self._position += len(view)
        return len(view)

    def write(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = self._position + len(view)
        if self._frozen_bytes is None or self._position < self._frozen_bytes:
            self._front.extend(bytes(max(0, end - len(self._front))))
            self._front[self._position : end] = view
        self.file_bytes = max(self.file_bytes, end)
        self._position = end
        return len(view)
