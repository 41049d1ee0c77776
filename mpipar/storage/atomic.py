"""Files and folders that appear whole or not at all, also when the writer is killed or the power fails.

What is written goes to a hidden sibling, is flushed to the disk, and takes its name by one rename, which POSIX makes
atomic within a file system. The folder is flushed last: without that the rename itself may be lost with the power.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = ".partial-"
_KEY_DIGITS = 8


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path at which to write; on success the file takes the place of whatever `path` was.

    The block creates the file itself. If the block raises, `path` is as it was and nothing is left beside it.
    """
    path = Path(path)
    partial = _partial_sibling(path)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder in which to write; on success it becomes `path`, see `put_in_place`."""
    path = Path(path)
    partial = _partial_sibling(path)
    partial.mkdir()
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_folder(path: str | os.PathLike[str], key: str | None = None) -> Path:
    """The hidden sibling in which a folder is made that takes long.

    Args:
        path: What it will be, by `put_in_place` or `publish_folder`.
        key: Says what is made, in hexadecimal; its first digits count. Who gives the same key finds the folder after a
            kill. Without it the name is a new one.
    """
    return _partial_sibling(Path(path), key)


def put_in_place(partial: Path, path: Path) -> None:
    """Flushes a folder, with all that is in it, and renames it to `path`.

    A folder that is already at `path` is replaced. POSIX has no exchange of two folders, so that takes two renames, and
    a kill between them loses the old folder: write under a new name what must never be without a predecessor.
    """
    for folder, folders, files in os.walk(partial):
        for name in (*folders, *files):
            flush(Path(folder, name))
    publish_folder(partial, path)


def publish_folder(partial: Path, path: Path) -> None:
    """Renames a folder to `path` like `put_in_place`, when all that is in it has been flushed.

    Raises:
        OSError: `path` is as it was.
    """
    flush(partial)
    replaced = _partial_sibling(path) if path.is_dir() else None
    if replaced:
        os.rename(path, replaced)
    try:
        os.rename(partial, path)
    except BaseException:
        if replaced:
            os.rename(replaced, path)
        raise
    flush(path.parent)
    if replaced:
        shutil.rmtree(replaced)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Removes a folder so that nobody sees half of it: it is renamed to a hidden sibling first."""
    path = Path(path)
    doomed = _partial_sibling(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_partials(folder: str | os.PathLike[str], name: str = "*", keep: Path | None = None) -> None:
    """Removes what killed writers left directly in `folder`, of the files and folders that were to be called `name`.

    Nobody may be writing them meanwhile.

    Args:
        folder: Where.
        name: What they were to be called; any name if it is not given.
        keep: What stays.
    """
    name = name if name == "*" else glob.escape(name)
    for leftover in Path(folder).glob(f"{_PREFIX}{'?' * _KEY_DIGITS}-{name}"):
        if leftover == keep:
            continue
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def _partial_sibling(path: Path, key: str | None = None) -> Path:
    # Random, so that two writers of one path never write into each other's file: the last rename wins.
    key = key or secrets.token_hex(_KEY_DIGITS // 2)
    return path.with_name(f"{_PREFIX}{key[:_KEY_DIGITS]}-{path.name.removeprefix(_PREFIX)}")


def flush(path: Path) -> None:
    """What is in a file, or which names are in a folder, survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
