"""Files of arrays: what is written is what is read; what is damaged is never read as if it were sound."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
import time
import types
import zlib
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mpipar.errors import DataError
from mpipar.storage import BLOCK_BYTES, ArrayFile, OpenFiles, room_for_files, write_arrays

DTYPES = ["?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", ">f4", ">i8", "<c8", "<c16"]

names = st.text("abc.01-_", min_size=1, max_size=12).filter(lambda name: set(name) != {"."})
attributes = st.dictionaries(
    names,
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False),
    max_size=12,
)
arrays = st.dictionaries(
    names.map("group/{}".format) | names.map("array-{}".format),
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    ),
    max_size=12,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "arrays.h5"


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrays=arrays, attributes=attributes)
def test_what_is_written_is_read(path, arrays, attributes):
    write_arrays(path, arrays, attributes)
    with ArrayFile(path) as file:
        assert file.names == tuple(sorted(arrays))
        assert file.attributes == attributes
        assert {key: type(value) for key, value in file.attributes.items()} == {
            key: type(value) for key, value in attributes.items()
        }
        for name, array in arrays.items():
            stored = file[name]
            assert (stored.shape, stored.dtype, stored.size) == (array.shape, array.dtype, array.size)
            assert same_bits(stored.array(), array)
        file.verify()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens.h5"
    values = np.random.default_rng(0).integers(0, 2**16, 5 * BLOCK_BYTES // 2 + 77, dtype=np.uint16)
    write_arrays(path, {"first": np.arange(5), "tokens": values})
    with ArrayFile(path) as file:
        yield file, values


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_range_is_read(tokens, data):
    file, values = tokens
    start = data.draw(st.integers(0, values.size))
    stop = data.draw(st.integers(start, values.size) | st.integers(start, min(start + 2049, values.size)))
    # Now and then by a new reader, which has checked nothing yet.
    if data.draw(st.booleans()):
        with ArrayFile(file.path) as fresh:
            part = fresh["tokens"].read(start, stop)
    else:
        part = file["tokens"].read(start, stop)
    assert same_bits(part, values[start:stop])
    assert part.flags.writeable
    for dtype in (np.uint16, np.int64):
        filled = np.empty(stop - start, dtype)
        file["tokens"].read_into(start, filled)
        assert np.array_equal(filled, values[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 10**9)])
def test_a_range_outside_is_refused(tokens, start, stop):
    with pytest.raises(IndexError, match="tokens"):
        tokens[0]["tokens"].read(start, stop)


@pytest.mark.parametrize("start", [-3, 5 * BLOCK_BYTES // 2 + 77])
def test_nothing_is_filled_from_outside(tokens, start):
    with pytest.raises(IndexError, match="tokens"):
        tokens[0]["tokens"].read_into(start, np.empty(2, np.uint16))


def test_a_missing_name_says_what_there_is(tokens):
    with pytest.raises(DataError, match=r"tokens\.h5: has no array 'weights'; it has first, tokens"):
        tokens[0]["weights"]


def test_other_programs_can_read_it(path):
    array = np.arange(600_000, dtype=np.int32).reshape(3, -1)
    write_arrays(path, {"layers/0.weight": array, "scalar": np.array(2.5)}, {"version": 1, "name": "größe"})
    with h5py.File(path, "r") as file:
        assert np.array_equal(file["layers/0.weight"], array)
        assert file["scalar"][()] == 2.5
        assert file.attrs["version"] == 1
        assert file.attrs["name"].decode() == "größe"
        offset = file["layers/0.weight"].id.get_offset()
    assert np.array_equal(np.memmap(path, dtype=np.int32, mode="r", offset=offset, shape=array.shape), array)


def test_many_arrays_and_long_attributes(path):
    arrays = {f"weights/layers.{i}.attention.wq.weight": np.full((2, 3), i, np.float32) for i in range(400)}
    write_arrays(path, arrays, {"config": "x" * 64_000})
    with ArrayFile(path) as file:
        assert file.attributes == {"config": "x" * 64_000}
        assert all(same_bits(file[name].array(), array) for name, array in arrays.items())


def test_the_same_arrays_give_the_same_bits(path):
    arrays = {"b/x": np.arange(5), "a": np.ones(3), "c": np.zeros((2, 0))}
    write_arrays(path, arrays, {"n": 1})
    first = path.read_bytes()
    time.sleep(1.1)  # HDF5 can keep times, in seconds
    write_arrays(path, dict(reversed(arrays.items())), {"n": 1})
    assert path.read_bytes() == first


def test_a_view_is_stored_as_it_looks(path):
    array = np.arange(24).reshape(4, 6)
    write_arrays(path, {"transposed": array.T, "reversed": array[::-1, ::2]})
    with ArrayFile(path) as file:
        assert np.array_equal(file["transposed"].array(), array.T)
        assert np.array_equal(file["reversed"].array(), array[::-1, ::2])


@pytest.mark.parametrize(
    "arrays",
    [
        {"": np.ones(1)},
        {"a//b": np.ones(1)},
        {"/a": np.ones(1)},
        {"a/../b": np.ones(1)},
        {"a": np.ones(1), "a/b": np.ones(1)},
        {"block_crc32": np.ones(1)},
        {"a": np.array(["text"])},
        {"a": np.array([None])},
    ],
)
def test_what_cannot_be_stored_is_refused(path, arrays):
    with pytest.raises(ValueError, match=r"a|block"):
        write_arrays(path, arrays)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("value", ["a\0b", "x" * 64_001])
def test_an_attribute_that_cannot_be_stored_is_refused(path, value):
    with pytest.raises(ValueError, match="attribute 'name'"):
        write_arrays(path, {}, {"name": value})


def test_a_folder_that_is_not_there_is_a_clean_error(path):
    with pytest.raises(FileNotFoundError) as caught:
        write_arrays(path.parent / "nothing" / "arrays.h5", {})
    assert caught.value.filename == str(path.parent / "nothing" / "arrays.h5")


def flip(path, byte, bit):
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ (1 << bit)]))


def test_a_flipped_bit_anywhere_is_never_read_as_sound(path):
    arrays: dict[str, np.ndarray] = {
        "group/a": np.arange(40, dtype=np.int16),
        "b": np.linspace(0, 1, 30),
        "c": np.array(7),
        "d": np.ones(0),
    }
    attributes: dict[str, str | int | float] = {"format": "test", "version": 3, "rate": 0.25}
    write_arrays(path, arrays, attributes)
    size = path.stat().st_size
    chance = random.Random(1)
    found = 0
    for byte in range(size):
        bit = chance.randrange(8)
        flip(path, byte, bit)
        try:
            with ArrayFile(path) as file:
                assert file.attributes == attributes
                assert file.names == tuple(sorted(arrays))
                for name, array in arrays.items():
                    assert same_bits(file[name].array(), array), (byte, bit)
        except DataError:
            found += 1
        flip(path, byte, bit)
    # Undetected are only flips in the padding between arrays, which nobody reads.
    assert found > 512 + sum(array.nbytes for array in arrays.values())
    with ArrayFile(path) as file:
        file.verify()


@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_flipped_bit_is_found_in_its_block(path, block):
    array = np.random.default_rng(0).integers(0, 2**32, BLOCK_BYTES, dtype=np.uint32)  # 4 blocks
    write_arrays(path, {"weights/x": array})
    with h5py.File(path, "r") as file:
        offset = file["weights/x"].id.get_offset()
    flip(path, offset + block * BLOCK_BYTES + 12_345, 3)
    per_block = BLOCK_BYTES // 4
    with ArrayFile(path) as file:
        stored = file["weights/x"]
        for other in {0, 1, 2, 3} - {block}:
            assert np.array_equal(
                stored.read(other * per_block, (other + 1) * per_block),
                array[other * per_block : (other + 1) * per_block],
            )
        # Found though the range that is asked for does not hold the flipped bit.
        for touch in (lambda: stored.read(block * per_block, block * per_block + 1), stored.array, file.verify):
            with pytest.raises(DataError, match=rf"arrays\.h5: array 'weights/x' is damaged in block {block} of 4"):
                touch()


def test_a_block_is_checked_once(path, monkeypatch):
    write_arrays(path, {"a": np.arange(3 * BLOCK_BYTES // 8)})
    checked: list[int] = []

    def counted(block):
        checked.append(len(block))
        return zlib.crc32(block)  # Python's own: as whoever has no zlib-ng reads it

    with ArrayFile(path) as file:
        monkeypatch.setattr("mpipar.storage.arrays.crc32", counted)
        for start in (0, 5, 40_000, 30_000, 70_000, 0):
            file["a"].read(start, start + 3)
        assert checked == [BLOCK_BYTES] * 3
        file.verify()  # but again when that is asked for
        assert checked == [BLOCK_BYTES] * 6


def test_a_flipped_bit_in_the_table_of_checksums_is_told_apart(path):
    write_arrays(path, {"a": np.arange(10)})
    with h5py.File(path, "r") as file:
        offset = file["block_crc32"].id.get_offset()
    flip(path, offset, 0)
    with pytest.raises(DataError, match="damaged table of checksums"):
        ArrayFile(path)


def test_truncation_is_an_error_wherever_the_file_ends(path):
    write_arrays(path, {"a": np.arange(1000), "b": np.arange(1000)})
    whole = path.read_bytes()
    for size in (0, 1, 511, 512, 600, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"arrays\.h5"):
            ArrayFile(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="bytes long"):
        ArrayFile(path)


def test_truncation_of_an_open_file_is_an_error(path):
    write_arrays(path, {"a": np.arange(300_000)})
    with ArrayFile(path) as file:
        file["a"].read(290_000, 300_000)
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(DataError, match="truncated"):
            file["a"].read(290_000, 300_000)  # checked before
        with pytest.raises(DataError, match="truncated"):
            file["a"].read(200_000, 290_000)  # not touched before


def test_a_file_of_another_program_is_an_error(path):
    with pytest.raises(DataError, match="cannot be opened: No such file"):
        ArrayFile(path)
    with pytest.raises(DataError, match="cannot be opened: Is a directory"):
        ArrayFile(path.parent)
    for content in (b"", b"text", b"[]", b'{"format":"x","version":1}', os.urandom(4096)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"arrays\.h5"):
            ArrayFile(path)
    with h5py.File(path, "w") as file:
        file["a"] = np.ones(3)
    with pytest.raises(DataError, match="not a file of arrays"):
        ArrayFile(path)


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "room"),
    [
        (256, 256, 256, 64),
        (1024, 4096, 4096, 1024),
        (1024, 500_000, 8192, 2048),
        (1024, resource.RLIM_INFINITY, 8192, 2048),
        (20_000, 20_000, None, 2048),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 2048),
    ],
)
def test_room_for_files(monkeypatch, soft, hard, raised, room):
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    assert room_for_files() == room
    assert set_to == ([] if raised is None else [(raised, hard)])


def test_what_was_asked_for_has_another_turn():
    class Door:
        held = None

        def open(self):
            return types.SimpleNamespace(asked=False)

    files: OpenFiles[Any] = OpenFiles(3)
    doors = [Door() for _ in range(5)]
    first = [files.open(door) for door in doors[:3]]
    assert [files.open(door) for door in doors[:3]] == first, "what is open is not opened again"
    first[0].asked = first[2].asked = True
    files.open(doors[3])
    assert [door.held is not None for door in doors] == [True, False, True, True, False]
    assert not first[0].asked and first[2].asked, "its turn did not come"
    files.open(doors[4])
    assert [door.held is not None for door in doors] == [False, False, True, True, True]
    files.close()
    assert not any(door.held for door in doors) and len(files) == 0


def test_readers_in_two_processes_after_a_fork(path):
    array = np.arange(500_000)
    write_arrays(path, {"a": array})
    script = (
        "import os, sys, numpy as np\n"
        "from mpipar.storage import ArrayFile\n"
        "file = ArrayFile(sys.argv[1])\n"
        "child = os.fork()\n"
        "chance = np.random.default_rng(child == 0)\n"
        "for start in chance.integers(0, 499_000, 2000).tolist():\n"
        "    assert np.array_equal(file['a'].read(start, start + 1000), np.arange(start, start + 1000))\n"
        "if child == 0: os._exit(0)\n"
        "sys.exit(os.waitpid(child, 0)[1])\n"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True, timeout=60)


@pytest.fixture
def small_files():
    """Files may not grow over 100,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("reserving", [True, False])
def test_a_file_that_does_not_fit_is_a_clean_error(path, small_files, monkeypatch, reserving):
    write_arrays(path, {"a": np.arange(10)})
    if not reserving:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        monkeypatch.setattr(os, "ftruncate", lambda descriptor, size: None)
    with pytest.raises(OSError, match=r"arrays\.h5") as caught:
        write_arrays(path, {"a": np.arange(100_000)})
    assert caught.value.errno == errno.EFBIG
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with ArrayFile(path) as file:
        assert np.array_equal(file["a"].array(), np.arange(10))


def refuse(descriptor, offset, size):
    raise OSError(errno.EOPNOTSUPP, "")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_clean_error(small_disk, monkeypatch):
    path = small_disk / "arrays.h5"
    write_arrays(path, {"a": np.arange(1000)})
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("written though there is no room"))
    with pytest.raises(OSError, match=r"No space left.*arrays\.h5") as caught:
        write_arrays(path, {"a": np.arange(200_000)})
    assert caught.value.errno == errno.ENOSPC
    assert [entry.name for entry in small_disk.iterdir()] == [path.name]
    with ArrayFile(path) as file:
        assert np.array_equal(file["a"].array(), np.arange(1000))
