"""Files and folders that appear whole or not at all, also when the writer is killed or the power fails.

What is written goes to a hidden sibling, is flushed to the disk, and takes its name by one rename, which POSIX makes
atomic within a file system. The folder is flushed last: without that the rename itself may be lost with the power.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = ".partial-"


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path at which to write; on success the file takes the place of whatever `path` was.

    The block creates the file itself. If the block raises, `path` is as it was and nothing is left beside it.
    """
    path = Path(path)
    partial = _partial_sibling(path)
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder in which to write; on success it becomes `path`.

    A folder that is already at `path` is replaced. POSIX has no exchange of two folders, so that takes two renames, and
    a kill between them loses the old folder: write under a new name what must never be without a predecessor.
    """
    path = Path(path)
    partial = _partial_sibling(path)
    replaced = _partial_sibling(path) if path.is_dir() else None
    partial.mkdir()
    try:
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                _flush(Path(folder, name))
            _flush(Path(folder))
        if replaced:
            os.rename(path, replaced)
        os.rename(partial, path)
    except BaseException:
        if replaced and replaced.exists() and not path.exists():
            os.rename(replaced, path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(path.parent)
    if replaced:
        shutil.rmtree(replaced)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder so that nobody sees half of it: it is renamed to a hidden sibling first."""
    path = Path(path)
    doomed = _partial_sibling(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_partials(folder: str | os.PathLike[str], name: str = "*") -> None:
    """Removes what killed writers left directly in `folder`, of the files and folders that were to be called `name`.

    Nobody may be writing them meanwhile.
    """
    for leftover in Path(folder).glob(f"{_PREFIX}*-{name}"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def _partial_sibling(path: Path) -> Path:
    # Random, so that two writers of one path never write into each other's file: the last rename wins.
    return path.with_name(f"{_PREFIX}{secrets.token_hex(4)}-{path.name.removeprefix(_PREFIX)}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
