"""A file of arrays by several writers that do not talk to each other, and what the disk is told meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpipar.errors import DataError
from mpipar.storage import BLOCK_BYTES, ArrayFile, ArrayWriter, Blueprint, table_checksum
from mpipar.storage.checksum import crc32

GENERATOR = np.random.default_rng(1)
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "b/long": GENERATOR.random(5 * BLOCK_BYTES // 8 + 3),
    "a": np.arange(7, dtype=np.int16),
    "empty": np.empty((0, 3), np.float32),
}


def blueprint() -> Blueprint:
    return Blueprint({name: (array.shape, array.dtype) for name, array in ARRAYS.items()}, {"made_by": "two"})


def content(name: str) -> memoryview:
    data: memoryview = ARRAYS[name].reshape(-1).view(np.uint8).data
    return data


def test_writers_share_an_array_and_a_file(tmp_path: Path) -> None:
    """Each has its own blueprint; the second begins before the space is reserved, and ends last."""
    path, middle = tmp_path / "file.h5", 2 * BLOCK_BYTES
    plan = blueprint()
    crcs = np.zeros(plan.num_blocks, np.uint32)
    with ArrayWriter(path, blueprint()) as second, ArrayWriter(path, plan) as first:
        late = second.write("b/long", middle, content("b/long")[middle:])
        first.reserve()
        assert path.stat().st_size == plan.file_bytes
        crcs[plan.blocks("b/long")] = [*first.write("b/long", 0, content("b/long")[:middle]), *late]
        crcs[plan.blocks("a")] = first.write("a", 0, content("a"))
        crcs[plan.blocks("empty")] = second.write("empty", 0, content("empty"))
        second.flush()
        with pytest.raises(DataError):
            ArrayFile(path)  # it is not sealed
        first.seal(crcs)
        first.flush()
    assert crcs[plan.blocks("a")].tolist() == [crc32(content("a"))]
    with ArrayFile(path) as file:
        file.verify()
        for name, array in ARRAYS.items():
            assert np.array_equal(file[name].array(), array)


def test_a_checksum_of_another_block_is_found(tmp_path: Path) -> None:
    path, plan = tmp_path / "file.h5", blueprint()
    with ArrayWriter(path, plan) as writer:
        crcs = np.concatenate([writer.write(name, 0, content(name)) for name in sorted(ARRAYS)])
        crcs[plan.blocks("b/long")] = crcs[plan.blocks("b/long")][::-1]
        writer.seal(crcs)
    with ArrayFile(path) as file, pytest.raises(DataError, match="'b/long' is damaged in block 0"):
        file.verify()


def test_a_checksum_of_checksums_is_of_their_order() -> None:
    crcs = np.array([1, 2**32 - 1, 3], np.uint32)
    assert table_checksum(crcs) == table_checksum([1, 2**32 - 1, 3]) == crc32(b"\1\0\0\0\xff\xff\xff\xff\3\0\0\0")
    assert table_checksum(crcs) != table_checksum(crcs[::-1])


def test_a_disk_without_room_leaves_an_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ArrayWriter(tmp_path / "file.h5", blueprint()) as writer:
        writer.write("a", 0, content("a"))
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
        with pytest.raises(OSError, match="No space left"):
            writer.reserve()
    assert (tmp_path / "file.h5").stat().st_size == 0


@pytest.mark.parametrize("system", ["listens", "refuses", "knows no advice"])
def test_the_disk_is_told_of_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """Once for every 8 MiB, and of all of it; a system that does not listen changes nothing."""
    told: list[tuple[int, int]] = []

    def advise(descriptor: int, begin: int, num_bytes: int, advice: int) -> None:
        if system == "refuses":
            raise OSError(errno.EINVAL, "Invalid argument")
        assert advice == 4  # POSIX_FADV_DONTNEED
        told.append((begin, begin + num_bytes))

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    if system == "knows no advice":
        monkeypatch.delattr(os, "posix_fadvise")
    data = np.ones((20 << 20) // 8)
    plan = Blueprint({"x": (data.shape, data.dtype)}, {})
    path = tmp_path / "file.h5"
    with ArrayWriter(path, plan) as writer:
        writer.seal(writer.write("x", 0, data.view(np.uint8).data))
    with ArrayFile(path) as file:
        file.verify()
    if system == "listens":
        begin = plan.extents["x"].offset
        assert told == [(begin, begin + (8 << 20)), (begin + (8 << 20), begin + (16 << 20))]
