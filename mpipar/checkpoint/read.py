"""An open checkpoint: whole tensors, or any box of one, read from whatever slices hold it.

Files are opened when they are needed, and of those only the blocks that are asked for are read; each is checked before
it is used, and their checksums against the index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpipar.checkpoint import dtypes
from mpipar.checkpoint.box import Box, reads
from mpipar.checkpoint.folder import steps
from mpipar.checkpoint.index import INDEX, Index, IndexFault, StoredSlice, Text, decode, file_name
from mpipar.errors import CheckpointError, DataError
from mpipar.storage import BLOCK_BYTES, ArrayFile, StoredArray, table_checksum

_READ_BYTES = 8 << 20
_OLD_STATE = "state.h5"  # of version 1


class Checkpoint(Mapping[str, Tensor]):
    """An open checkpoint: tensors on the CPU by name, read, and their checksums checked, when they are asked for.

    Args:
        path: Its folder.

    Attributes:
        step: Number of finished steps.
        attributes: What else the run has kept.
        index: What it holds, and where.

    Raises:
        CheckpointError: There is none in the folder, or its index is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.index = self._read_index()
        self.step = self.index.step
        self.attributes = self.index.attributes
        self._files: dict[int, ArrayFile] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, Box.whole(self.index.tensors[name].shape))

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, as a new one.

        Raises:
            CheckpointError: What holds it is damaged, or not there.
        """
        stored = self.index.tensors[name]
        out = torch.empty(box.extent, dtype=dtypes.named(stored.dtype))
        self.read_into(name, box, out)
        return out

    def read_into(self, name: str, box: Box, out: Tensor) -> None:
        """The same, into a tensor on the CPU, of this dtype and of the shape of the box, that lies in one piece."""
        stored = self.index.tensors[name]
        assert box.fits(stored.shape) and out.is_contiguous() and tuple(out.shape) == box.extent
        target = _as_stored(out, stored.dtype)
        missing = box.size
        for part in stored.slices:
            common = part.box.common(box)
            if common.size:
                self._read_slice(part, common.within(part.box), target[common.within(box).index])
                missing -= common.size
        assert missing == 0, "slices make up the tensor"

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.tensors)

    def __len__(self) -> int:
        return len(self.index.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.index.tensors  # without reading it

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, without reading it."""
        stored = self.index.tensors[name]
        return stored.shape, dtypes.named(stored.dtype)

    def verify(self) -> None:
        """Reads all that there is. Raises CheckpointError that names the first file that is damaged."""
        for name, text in self.index.texts.items():
            try:
                content = (self.path / name).read_bytes()
            except OSError as error:
                raise self._damaged(f"{self.path / name} cannot be read: {error.strerror}") from error
            if Text.of(content) != text:
                raise self._damaged(f"{self.path / name} is damaged: its checksum differs")
        for number in range(len(self.index.file_bytes)):
            try:
                self._file(number).verify()
            except DataError as error:
                raise self._damaged(error) from error
        for stored in self.index.tensors.values():
            for part in stored.slices:
                self._array(part)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_index(self) -> Index:
        path = self.path / INDEX
        if not path.is_file():
            if (self.path / _OLD_STATE).is_file():
                raise CheckpointError(
                    f"{self.path} is a checkpoint of version 1, of before it had an {INDEX}: go on from it with the "
                    "mpipar that wrote it, or start a new run"
                )
            raise CheckpointError(f"{self.path} is not a checkpoint: it has no {INDEX}")
        try:
            return decode(path.read_bytes())
        except OSError as error:
            raise self._damaged(f"{path} cannot be read: {error.strerror}") from error
        except IndexFault as error:
            raise self._damaged(str(error)) from error

    def _file(self, number: int) -> ArrayFile:
        if number not in self._files:
            path = self.path / file_name(number)
            try:
                file = ArrayFile(path)
            except DataError as error:
                raise self._damaged(error) from error
            self._files[number] = file
        return self._files[number]

    def _array(self, part: StoredSlice) -> StoredArray:
        """The data set of a slice, if it is the one that the index means."""
        try:
            array = self._file(part.file)[part.dataset]
        except DataError as error:
            raise self._damaged(error) from error
        if array.shape != part.box.extent or table_checksum(array.crcs) != part.crc32:
            raise self._damaged(f"{file_name(part.file)} is not the one of {INDEX}: it has another {part.dataset!r}")
        return array

    def _read_slice(self, part: StoredSlice, box: Box, out: np.ndarray[Any, Any]) -> None:
        array = self._array(part)
        gap, most = BLOCK_BYTES // array.dtype.itemsize, _READ_BYTES // array.dtype.itemsize
        try:
            for read in reads(array.shape, box, gap, most):
                target = out[read.into]
                if target.size == read.end - read.begin and target.flags.c_contiguous and target.dtype == array.dtype:
                    array.read_into(read.begin, target)
                else:
                    target[...] = array.read(read.begin, read.end).reshape(read.shape)[read.index]
        except DataError as error:
            raise self._damaged(error) from error

    def _damaged(self, problem: str | DataError) -> CheckpointError:
        what = problem if isinstance(problem, str) else problem.what
        others = [other for other in steps(self.path.parent) if self.path.name != f"step-{other:08d}"]
        advice = f". To go on from step {others[-1]}, remove {self.path}" if others else ""
        named = what.replace(f"{self.path}/", "")  # files by their names in it
        return CheckpointError(f"checkpoint {self.path} cannot be used: {named}{advice}")


def _as_stored(tensor: Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """The memory of a tensor, as numpy sees it in the dtype of data sets."""
    return tensor.view(-1).view(torch.uint8).numpy().view(dtypes.stored(dtype)).reshape(tuple(tensor.shape))
