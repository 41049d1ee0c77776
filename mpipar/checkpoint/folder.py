"""A checkpoint is a folder that appears whole or not at all.

    checkpoints/step-00000200/state.h5      the tensors by name, their checksums, the step, what else the caller keeps
    checkpoints/step-00000200/config.toml   and other text files of the caller

It is written under a hidden name, flushed to the disk and renamed, so a writer that is killed leaves the earlier
checkpoints as they were. One process writes, since the state is the same on all; files of shards can join `state.h5`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpipar.errors import CheckpointError, DataError
from mpipar.storage import ArrayFile, StoredArray, atomic_folder, remove_folder, remove_partials, write_arrays

_FORMAT = "mpipar-checkpoint"
_VERSION = 1
_STATE = "state.h5"
_NAME = re.compile(r"step-(\d{8,})")
_NOTES = "notes"  # an array and not an attribute, which HDF5 keeps below 64 KiB
_TENSORS = "tensors/"


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    attributes: Mapping[str, Any],
    *,
    files: Mapping[str, str],
    keep: int,
) -> Path:
    """Writes the checkpoint of a step below `root` and removes all but the `keep` latest up to it.

    Args:
        root: The folder of a run's checkpoints; made if it is not there. Nobody else may be writing in it.
        step: Number of finished steps.
        tensors: By name, of any dtype and device; `capture` gives those of a model and its optimizer.
        attributes: What else is needed to go on, as JSON.
        files: Text files to lie beside the tensors, by name.
        keep: At least 1.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: It cannot be written. The earlier checkpoints are as they were.
    """
    assert keep >= 1
    path = root / f"step-{step:08d}"
    arrays, dtypes = {}, {}
    for name, tensor in tensors.items():
        arrays[_TENSORS + name], dtype = _to_numpy(tensor)
        if dtype is not None:
            dtypes[name] = dtype
    notes = json.dumps({"attributes": dict(attributes), "dtypes": dtypes})
    arrays[_NOTES] = np.frombuffer(notes.encode(), dtype=np.uint8)
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_partials(root)
        with atomic_folder(path) as partial:
            write_arrays(partial / _STATE, arrays, {"format": _FORMAT, "version": _VERSION, "step": step})
            for name, text in files.items():
                (partial / name).write_text(text, encoding="utf-8")
        for old in [other for other in _steps(root) if other <= step][:-keep]:
            remove_folder(root / f"step-{old:08d}")
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be written: {error.strerror or error}. Earlier checkpoints are as they were"
        ) from error
    return path


def latest(root: Path) -> Path | None:
    """The folder of the checkpoint with the highest step below `root`, or None if there is none."""
    steps = _steps(root)
    return root / f"step-{steps[-1]:08d}" if steps else None


def discard_after(root: Path, step: int) -> None:
    """Removes the checkpoints of later steps than `step`, to which a run goes back that goes on from there."""
    for later in _steps(root):
        if later > step:
            remove_folder(root / f"step-{later:08d}")


def load(path: Path) -> Checkpoint:
    """Opens the checkpoint in the folder `path`. Raises CheckpointError if there is none, or a damaged one."""
    return Checkpoint(path)


class Checkpoint(Mapping[str, Tensor]):
    """An open checkpoint: tensors on the CPU by name, read, and their checksums checked, when they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / _STATE).is_file():
            raise CheckpointError(f"{path} is not a checkpoint: it has no {_STATE}")
        try:
            self._file = ArrayFile(path / _STATE)
        except DataError as error:
            raise self._damaged(error) from error
        try:
            self._read_notes()
        except BaseException:
            self._file.close()
            raise

    def _read_notes(self) -> None:
        attributes = self._file.attributes
        kind, version = attributes.get("format"), attributes.get("version")
        if (kind, version) != (_FORMAT, _VERSION):
            raise CheckpointError(
                f"{self.path} is of format {kind!r} version {version!r}; {_FORMAT!r} version {_VERSION} is read here"
            )
        notes = json.loads(self._read(self._file[_NOTES]).tobytes())
        self.step = int(attributes["step"])
        self.attributes: dict[str, Any] = notes["attributes"]
        self._dtypes: dict[str, str] = notes["dtypes"]
        self._stored = {
            name.removeprefix(_TENSORS): self._file[name] for name in self._file.names if name.startswith(_TENSORS)
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self._read(self._stored[name]))
        return tensor.view(self.describe(name)[1]) if name in self._dtypes else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # without reading it

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor, without reading it."""
        stored = self._stored[name]
        if name in self._dtypes:
            return stored.shape, getattr(torch, self._dtypes[name])
        return stored.shape, torch.from_numpy(np.empty(0, stored.dtype)).dtype

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, stored: StoredArray) -> np.ndarray[Any, Any]:
        try:
            return stored.array()
        except DataError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: DataError) -> CheckpointError:
        others = [other for other in _steps(self.path.parent) if self.path.name != f"step-{other:08d}"]
        advice = f": to go on from step {others[-1]}, remove {self.path}" if others else ""
        return CheckpointError(f"checkpoint {self.path} cannot be used: {error.message}{advice}")


def _steps(root: Path) -> list[int]:
    """The steps of which there are checkpoints, in order."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _to_numpy(tensor: Tensor) -> tuple[np.ndarray[Any, Any], str | None]:
    """The tensor's values; those of a dtype that numpy has not, such as bfloat16, as raw integers and with its name."""
    tensor = tensor.detach().cpu().contiguous()
    try:
        return tensor.numpy(), None
    except TypeError:
        raw = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[tensor.element_size()]
        return tensor.view(raw).numpy(), str(tensor.dtype).removeprefix("torch.")
