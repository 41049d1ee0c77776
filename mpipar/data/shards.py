"""The data set on disk: a folder of HDF5 shards beside the tokenizer that made them.

    DIR/tokenizer.json
    DIR/train-00000.h5 ...      DIR/val-00000.h5 ...
    DIR/train.index.h5          DIR/val.index.h5        what the shards hold, see `index`

`shard` tells what is in one of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpipar.data import tokenizer
from mpipar.data.index import Inventory, read_index, write_index
from mpipar.data.shard import Shard, shard_name
from mpipar.errors import DataError
from mpipar.storage import ArrayFile, ArrayFiles, Header, OpenFiles, room_for_files

TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "val")

_PACK = "`python -m mpipar.data pack INPUT... --out {folder}` makes one"

Tokens = NDArray[Any]  # uint16 or uint32


class ShardSet:
    """All shards of one split of a data set. Each is opened when it is first read, and only so many stay open.

    Safe to read from several threads.

    Args:
        folder: Where the data set is.
        split: "train" or "val".
        inventory: What shards there are: `take_inventory`.
        files: Keeps them open, together with others; by default the set does.

    Attributes:
        shards: The shards, by index.
        tokens: Those of each shard.
        num_tokens: Tokens in all shards, ends of text included.
        num_counted: How many of them count when they are predicted.
        num_documents: Documents in all shards.
        text_bytes: The size of the documents as UTF-8.
        vocab_size: One more than the largest token id.
        tokenizer_id: The identity of the tokenizer, see `tokenizer`.
        unigrams: int64 [vocab_size], how often each token occurs.
    """

    def __init__(self, folder: Path, split: str, inventory: Inventory, files: ArrayFiles | None = None):
        self.folder = folder
        self.split = split
        self.unigrams = inventory.unigrams
        self._files: ArrayFiles = OpenFiles(room_for_files()) if files is None else files
        self._owns_files = files is None
        self.shards = tuple(
            Shard(folder / shard_name(split, index), header, self._files)
            for index, header in enumerate(inventory.headers)
        )
        self.tokens = tuple(shard.tokens for shard in self.shards)
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self.num_counted = sum(shard.num_counted for shard in self.shards)
        self.num_documents = sum(shard.num_documents for shard in self.shards)
        self.text_bytes = sum(shard.text_bytes for shard in self.shards)
        self.vocab_size = self.shards[0].vocab_size
        self.tokenizer_id = self.shards[0].tokenizer_id

    @classmethod
    def open(cls, folder: str | Path, split: str) -> ShardSet:
        """Finds the shards of a split and checks that they belong together. No token is read yet.

        Raises:
            DataError: There is no data set, a shard is missing or damaged, or the shards and tokenizer.json differ.
        """
        folder = Path(folder)
        return cls(folder, split, take_inventory(folder, split))

    @property
    def num_tokens_per_shard(self) -> list[int]:
        return [shard.num_tokens for shard in self.shards]

    def read(self, shard: int, offset: int, length: int) -> Tokens:
        """Tokens offset..offset + length of a shard, as stored; raises DataError where the file is damaged."""
        return self.tokens[shard].read(offset, offset + length)

    def read_counted(self, shard: int, offset: int, length: int) -> NDArray[np.bool_] | bool:
        """Which tokens offset..offset + length of a shard count when they are predicted: [length], or True for all."""
        return self.shards[shard].read_counted(offset, length)

    @property
    def dtype(self) -> np.dtype[Any]:
        """In which tokens are stored: one that holds the vocabulary."""
        return self.shards[0].tokens.dtype

    def read_tokenizer(self) -> tokenizer.Tokenizer:
        """The tokenizer of the data set."""
        return tokenizer.load(self.folder / TOKENIZER_FILE)

    @cached_property
    def unigram_entropy(self) -> float:
        """In nats a token: the loss of a model that knows how frequent each token is, and nothing else."""
        return entropy(self.unigrams / self.num_tokens)

    def close(self) -> None:
        if self._owns_files:
            self._files.close()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def take_inventory(folder: Path, split: str) -> Inventory:
    """What shards a split has: as its index says where that is of these files, else opened one after the other.

    Raises:
        DataError: There is no data set, a shard is missing or damaged, or the shards and tokenizer.json differ.
    """
    paths = shard_paths(folder, split)
    inventory = read_index(folder / index_name(split), paths) or _open_one_by_one(paths)
    _check_together(folder, split, paths, inventory.headers)
    return inventory


def write_indices(folder: Path) -> None:
    """Writes the index of every split of a data set.

    Raises:
        DataError: A shard is missing or damaged, or the disk is full.
    """
    for split in splits_in(folder):
        write_index(folder / index_name(split), _open_one_by_one(shard_paths(folder, split)))


def verify_index(folder: Path, split: str) -> None:
    """Raises DataError if a split has an index, and it is damaged, or not what the shards themselves say."""
    paths, path = shard_paths(folder, split), folder / index_name(split)
    says = read_index(path, paths)
    if path.exists():
        with ArrayFile(path) as file:
            file.verify()
    if says is None:
        return
    holds = _open_one_by_one(paths)
    if says.headers != holds.headers or not np.array_equal(says.unigrams, holds.unigrams):
        raise DataError(f"{path} is not of these shards: delete it, or pack the data set again")


def _open_one_by_one(paths: Sequence[Path]) -> Inventory:
    headers = []
    unigrams: NDArray[np.int64] | None = None
    for path in paths:
        with Shard(path) as shard:
            headers.append(shard.header)
            counts = shard.read_unigrams()
        # Of another vocabulary only in another data set, which is noticed where shards are compared.
        unigrams = counts if unigrams is None or unigrams.shape != counts.shape else unigrams + counts
    assert unigrams is not None
    return Inventory(tuple(headers), unigrams)


def entropy(frequencies: NDArray[np.float64]) -> float:
    """Of a distribution, in nats."""
    positive = frequencies[frequencies > 0]
    return float(-(positive * np.log(positive)).sum())


def splits_in(folder: Path) -> list[str]:
    """The splits of a data set, the training split first. Raises DataError where there is no data set."""
    shard_paths(folder, "train")
    return [split for split in SPLITS if any(folder.glob(f"{split}-*.h5"))]


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The files of a split, by index. Raises DataError where there are none."""
    if not folder.is_dir():
        if folder.exists():
            raise DataError(f"{folder} is a file; a data set is a folder that `python -m mpipar.data pack` makes")
        raise DataError(f"there is no data set at {folder}. " + _PACK.format(folder=folder))
    paths = sorted(folder.glob(f"{split}-*.h5"))
    if paths:
        return paths
    if split == "val" and any(folder.glob("train-*.h5")):
        raise DataError(f"{folder} has no validation split: pack it again, with a --val-fraction above 0")
    raise DataError(
        f"{folder} holds no shards ({split}-00000.h5 ...). `python -m mpipar.data pack {folder} --out NEW_FOLDER` "
        "makes a data set of the text in it"
    )


def index_name(split: str) -> str:
    return f"{split}.index.h5"


def _check_together(folder: Path, split: str, paths: Sequence[Path], headers: Sequence[Header]) -> None:
    described = [header.layout.attributes for header in headers]
    first = described[0]
    for index in range(int(first["num_shards"])):
        if index >= len(paths) or paths[index].name != shard_name(split, index) or described[index]["index"] != index:
            raise DataError(
                f"{folder}: {shard_name(split, index)} of {first['num_shards']} {split} shards is missing. Copy it "
                "again, or pack the data set again"
            )
    for path, attributes in zip(paths, described, strict=True):
        alike = all(attributes[key] == first[key] for key in ("version", "num_shards", "tokenizer", "vocab_size"))
        if attributes["split"] != split or not alike:
            raise DataError(f"{path} is of another data set than {paths[0].name}: one folder, one data set")
    try:
        found = tokenizer.identity((folder / TOKENIZER_FILE).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {folder / TOKENIZER_FILE}: {error.strerror}. It belongs to the shards") from error
    if found != first["tokenizer"]:
        raise DataError(
            f"{folder / TOKENIZER_FILE} is not the tokenizer that made the shards: its identity is {found[:12]}, "
            f"theirs {str(first['tokenizer'])[:12]}. Bring back the file that was packed with them, or pack again"
        )
