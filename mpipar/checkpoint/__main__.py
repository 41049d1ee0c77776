"""The command `python -m mpipar.checkpoint digest FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from mpipar.checkpoint.digest import digest
from mpipar.checkpoint.folder import latest, load
from mpipar.errors import CheckpointError


def print_digest(folder: tyro.conf.Positional[Path]) -> None:
    """Prints one SHA-256 over all weights and optimizer state: equal if and only if two runs came to the same bits.

    Args:
        folder: A checkpoint; or a run, of which the latest is taken.
    """
    with load(find(folder)) as found:
        print(digest(found))


def find(folder: Path) -> Path:
    """The checkpoint that is meant.

    Raises:
        CheckpointError: There is none.
    """
    if (folder / "state.h5").exists():
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
        tyro.extras.subcommand_cli_from_dict({"digest": print_digest}, prog="python -m mpipar.checkpoint")
    except CheckpointError as error:
        print(f"mpipar: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
