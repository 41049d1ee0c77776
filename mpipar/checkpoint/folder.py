"""The folder of a run's checkpoints, and which of them are kept.

    checkpoints/step-00000200/index.json    what there is, and where
    checkpoints/step-00000200/state-0.h5    the tensors, one file for each host that wrote them
    checkpoints/step-00000200/config.toml   and other text files of the caller

What is still being written has a hidden name. A checkpoint that is listed is whole.
"""

from __future__ import annotations

import re
from pathlib import Path

from mpipar.storage import remove_folder

_NAME = re.compile(r"step-(\d{8,})")


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps of which there are checkpoints, in order."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def latest(root: Path) -> Path | None:
    """The folder of the checkpoint with the highest step below `root`, or None if there is none."""
    found = steps(root)
    return folder_of(root, found[-1]) if found else None


def discard_after(root: Path, step: int) -> None:
    """Removes the checkpoints of later steps than `step`, to which a run goes back that goes on from there."""
    for later in steps(root):
        if later > step:
            remove_folder(folder_of(root, later))


def discard_old(root: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Removes all but the `keep` latest of the checkpoints up to `step`, and those of multiples of `keep_every`."""
    for old in [other for other in steps(root) if other <= step][:-keep]:
        if not keep_every or old % keep_every:
            remove_folder(folder_of(root, old))
