"""The command `python -m mpipar.checkpoint info|verify|digest|export FOLDER`. One process; it needs no MPI."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from mpipar.amounts import size
from mpipar.checkpoint.digest import digest
from mpipar.checkpoint.export import Names, export
from mpipar.checkpoint.folder import latest
from mpipar.checkpoint.index import INDEX, file_name
from mpipar.checkpoint.read import Checkpoint
from mpipar.command_line import parse_one_of
from mpipar.errors import CheckpointError, MpiparError


@dataclass(frozen=True, kw_only=True)
class _OfCheckpoint:
    """What all commands take."""

    folder: tyro.conf.Positional[Path]
    """A checkpoint; or a run, of which the latest is taken."""

    def open(self) -> Checkpoint:
        """The checkpoint, for a with statement."""
        return Checkpoint(find(self.folder))


@dataclass(frozen=True, kw_only=True)
class Info(_OfCheckpoint):
    """Prints what a checkpoint holds, from its index alone."""

    tensors: bool = False
    """Each tensor too: name, dtype, shape, and in how many slices it lies."""

    def run(self) -> None:
        with self.open() as found:
            index = found.index
            print(f"checkpoint  {found.path}")
            print(f"step        {found.step:,}")
            for kind, count in sorted(Counter(name.partition("/")[0] for name in found).items()):
                elements = sum(math.prod(found.describe(name)[0]) for name in found if name.startswith(f"{kind}/"))
                print(f"{kind:<11} {count} tensors, {elements:,} elements")
            for number, num_bytes in enumerate(index.file_bytes):
                print(f"file        {file_name(number)}, {size(num_bytes)}")
            for name, text in index.texts.items():
                print(f"file        {name}, {size(text.num_bytes)}")
            for name, stored in index.tensors.items() if self.tensors else ():
                shape = "x".join(map(str, stored.shape)) or "scalar"
                slices = f", {len(stored.slices)} slices" if len(stored.slices) > 1 else ""
                print(f"tensor      {name} {stored.dtype} {shape}{slices}")


@dataclass(frozen=True, kw_only=True)
class Verify(_OfCheckpoint):
    """Reads a checkpoint to the last byte, and names the first file that is damaged."""

    def run(self) -> None:
        with self.open() as found:
            found.verify()
            print(f"sound: {found.path}, {size(sum(found.index.file_bytes))}")


@dataclass(frozen=True, kw_only=True)
class Digest(_OfCheckpoint):
    """Prints one SHA-256 over all weights and optimizer state: equal if and only if two runs came to the same bits."""

    def run(self) -> None:
        with self.open() as found:
            print(digest(found))


@dataclass(frozen=True, kw_only=True)
class Export(_OfCheckpoint):
    """Writes the weights as model.safetensors, with a config.json, for other programs."""

    out: Path
    """The folder to write; it must not exist."""
    names: Names = "mpipar"
    """Those of mpipar, or those of the Hugging Face library's models."""

    def run(self) -> None:
        with self.open() as found:
            num_bytes = export(found, self.out, self.names)
            print(f"exported: step {found.step:,}, {size(num_bytes)} of weights, {self.out}")


Command = Info | Verify | Digest | Export

_COMMANDS: dict[str, type[Command]] = {"info": Info, "verify": Verify, "digest": Digest, "export": Export}


def find(folder: Path) -> Path:
    """The checkpoint that is meant.

    Raises:
        CheckpointError: There is none.
    """
    if (folder / INDEX).exists():
        return folder
    for root in (folder / "checkpoints", folder):
        path = latest(root)
        if path is not None:
            return path
    raise CheckpointError(
        f"{folder} holds no checkpoint: give the folder of a run, or of a checkpoint such as step-00000100"
    )


def main() -> int:
    try:
        parse_one_of(_COMMANDS, "python -m mpipar.checkpoint").run()
    except MpiparError as error:
        print(f"mpipar: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
