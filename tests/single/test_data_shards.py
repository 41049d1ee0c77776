"""Shards: what is written is what is read, and every kind of damage is found and named."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpipar.data import tokenizer
from mpipar.data.shard import Shard, write_shard
from mpipar.data.shards import ShardSet, take_inventory, verify_index, write_indices
from mpipar.errors import DataError
from mpipar.storage import ArrayFile, ArrayFiles, OpenFiles, write_arrays

NUM_SHARDS = 3
VOCAB = 300


@pytest.fixture(scope="module")
def made_by() -> tokenizer.Tokenizer:
    made_by = tokenizer.train([f"word{n} " * 3 for n in range(200)], VOCAB)
    assert made_by.vocab_size == VOCAB
    return made_by


def documents_of(index: int) -> list[np.ndarray]:
    rng = np.random.default_rng(index)
    return [rng.integers(0, VOCAB, size, dtype=np.uint32) for size in (1, 200_000, 17, 300_000)]


@pytest.fixture
def folder(tmp_path: Path, made_by: tokenizer.Tokenizer) -> Path:
    (tmp_path / "tokenizer.json").write_text(made_by.text)
    for index in range(NUM_SHARDS):
        write_shard(tmp_path, "train", index, NUM_SHARDS, documents_of(index), made_by, text_bytes=1000)
    write_shard(tmp_path, "val", 0, 1, [np.arange(300, dtype=np.uint32)], made_by, text_bytes=600)
    return tmp_path


Change = Callable[[dict[str, Any], dict[str, Any]], None]


def rewrite(path: Path, change: Change) -> None:
    """A shard that is whole as a file, but says something else."""
    with ArrayFile(path) as file:
        arrays, attributes = {name: file[name].array() for name in file.names}, dict(file.attributes)
    change(arrays, attributes)
    write_arrays(path, arrays, attributes)


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def place_of_tokens(path: Path) -> int:
    with Shard(path) as shard:
        tokens = shard.tokens.array().tobytes()
    return path.read_bytes().index(tokens[:64])


def test_what_is_written_is_read(folder: Path, made_by: tokenizer.Tokenizer) -> None:
    with ShardSet.open(folder, "train") as shards:
        assert len(shards.shards) == NUM_SHARDS
        assert shards.num_documents == 4 * NUM_SHARDS
        assert shards.num_tokens == sum(shards.num_tokens_per_shard) == NUM_SHARDS * 500_018
        assert shards.text_bytes == 3000
        assert (shards.vocab_size, shards.tokenizer_id) == (VOCAB, made_by.identity)
        assert shards.read_tokenizer().identity == made_by.identity
        for index, shard in enumerate(shards.shards):
            tokens = np.concatenate(documents_of(index))
            assert shard.tokens.dtype == np.uint16
            assert np.array_equal(shards.read(index, 0, tokens.size), tokens)
            assert np.array_equal(shards.read(index, 123_456, 2049), tokens[123_456:][:2049])
            assert shard.read_documents().tolist() == [0, 1, 200_001, 200_018, 500_018]
            shard.verify()


def test_unigram_entropy(folder: Path) -> None:
    with ShardSet.open(folder, "val") as shards:
        assert shards.unigram_entropy == pytest.approx(math.log(300))


def test_large_vocabularies_take_four_bytes(tmp_path: Path, made_by: tokenizer.Tokenizer) -> None:
    class Large:
        vocab_size = (1 << 16) + 1
        identity = made_by.identity

    write_shard(tmp_path, "train", 0, 1, [np.array([1 << 16], np.uint32)], Large(), 1)  # type: ignore[arg-type]
    with Shard(tmp_path / "train-00000.h5") as shard:
        assert shard.tokens.dtype == np.uint32
        assert shard.tokens.array().tolist() == [1 << 16]


def test_the_same_bits_every_time(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    made_by = tokenizer.load(folder / "tokenizer.json")
    write_shard(other, "train", 1, NUM_SHARDS, documents_of(1), made_by, text_bytes=1000)
    assert (other / "train-00001.h5").read_bytes() == (folder / "train-00001.h5").read_bytes()


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no data set at .*mpipar\.data pack INPUT"):
        ShardSet.open(tmp_path / "none", "train")
    (tmp_path / "file").write_text("text")
    with pytest.raises(DataError, match=r"file is a file; a data set is a folder"):
        ShardSet.open(tmp_path / "file", "train")
    with pytest.raises(DataError, match=r"holds no shards.*mpipar\.data pack .* --out NEW_FOLDER"):
        ShardSet.open(tmp_path, "train")


def test_no_validation_split(folder: Path) -> None:
    (folder / "val-00000.h5").unlink()
    with pytest.raises(DataError, match=r"no validation split.*--val-fraction"):
        ShardSet.open(folder, "val")


@pytest.mark.parametrize("index", range(NUM_SHARDS))
def test_missing_shard(folder: Path, index: int) -> None:
    (folder / f"train-0000{index}.h5").unlink()
    with pytest.raises(DataError, match=f"train-0000{index}.h5 of 3 train shards is missing"):
        ShardSet.open(folder, "train")


@pytest.mark.parametrize("keep", [0, 100, 4000, -1])
def test_truncated_shard(folder: Path, keep: int) -> None:
    path = folder / "train-00001.h5"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"train-00001\.h5"):
        ShardSet.open(folder, "train")


def test_truncated_while_open(folder: Path) -> None:
    with ShardSet.open(folder, "train") as shards:
        path = shards.shards[2].path
        shards.read(2, 480_000, 2049)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(DataError, match=r"train-00002\.h5.* was truncated"):
            shards.read(2, 480_000, 2049)


def test_flipped_bit_is_found_where_it_is_read(folder: Path) -> None:
    path = folder / "train-00001.h5"
    flip_bit(path, place_of_tokens(path) + 2 * 400_000)
    with ShardSet.open(folder, "train") as shards:
        shards.read(1, 0, 2049)
        for _ in range(2):
            with pytest.raises(DataError, match=r"train-00001\.h5: array 'tokens' is damaged in block 3"):
                shards.read(1, 400_000, 10)
        with pytest.raises(DataError, match=r"train-00001\.h5: array 'tokens' is damaged in block 3"):
            shards.shards[1].verify()


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened from here on."""
    opened = []
    open_ = os.open

    def spy(path: Any, *rest: Any) -> int:
        opened.append(Path(path).name)
        return open_(path, *rest)

    monkeypatch.setattr(os, "open", spy)
    return opened


def test_the_index_is_read_instead_of_the_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardSet.open(folder, "train") as shards:
        expected = [shard.header for shard in shards.shards]
        entropy = shards.unigram_entropy
    write_indices(folder)
    opened = count_opened(monkeypatch)
    with ShardSet.open(folder, "train") as shards:
        assert [shard.header for shard in shards.shards] == expected
        assert shards.unigram_entropy == entropy
        assert opened == ["train.index.h5"]
        shards.read(1, 0, 10)
        assert opened == ["train.index.h5", "train-00001.h5"]
    verify_index(folder, "train")


@pytest.mark.parametrize("same_size", [False, True])
def test_an_index_of_other_shards(folder: Path, made_by: tokenizer.Tokenizer, same_size: bool) -> None:
    write_indices(folder)
    documents = [documents_of(7)[1]] if not same_size else documents_of(7)
    write_shard(folder, "train", 1, NUM_SHARDS, documents, made_by, text_bytes=1000)
    with ShardSet.open(folder, "train") as shards:
        if same_size:  # which cannot be seen before it is opened
            with pytest.raises(DataError, match=r"train-00001\.h5 is not the file that was described before"):
                shards.read(1, 0, 10)
            with pytest.raises(DataError, match=r"train\.index\.h5 is not of these shards: delete it"):
                verify_index(folder, "train")
        else:
            assert np.array_equal(shards.read(1, 0, 10), documents[0][:10])


def test_a_missing_shard_is_noticed_with_an_index(folder: Path) -> None:
    write_indices(folder)
    (folder / "train-00001.h5").unlink()
    with pytest.raises(DataError, match=r"train-00001.h5 of 3 train shards is missing"):
        ShardSet.open(folder, "train")


def test_a_damaged_index_is_named(folder: Path) -> None:
    write_indices(folder)
    path = folder / "train.index.h5"
    flip_bit(path, path.read_bytes().index(b'"block"'))
    with pytest.raises(DataError, match=r"train\.index\.h5.*array 'headers' is damaged.*Delete it"):
        ShardSet.open(folder, "train")


def test_only_so_many_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = count_opened(monkeypatch)
    files: ArrayFiles = OpenFiles(2)
    with ShardSet(folder, "train", take_inventory(folder, "train"), files) as shards:
        opened.clear()
        for index in (0, 1, 0, 2, 2, 1, 0):
            assert np.array_equal(shards.read(index, 0, 9), np.concatenate(documents_of(index))[:9])
            assert len(files) <= 2
            assert sum(shard._file.held is not None for shard in shards.shards) == len(files)
            assert len(list(Path("/proc/self/fd").iterdir())) < 100
    assert opened[:3] == [f"train-0000{index}.h5" for index in (0, 1, 2)]
    assert len(opened) in (4, 5), "the one that was let go for the third, and at most one more"
    files.close()
    with pytest.raises(ValueError, match="was closed"):
        shards.read(0, 0, 9)


def test_threads_read_while_files_are_closed(folder: Path) -> None:
    tokens = [np.concatenate(documents_of(index)) for index in range(NUM_SHARDS)]
    files: ArrayFiles = OpenFiles(1)

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        for shard, offset in zip(rng.integers(0, NUM_SHARDS, 400), rng.integers(0, 490_000, 400), strict=True):
            if not np.array_equal(shards.read(shard, offset, 2049), tokens[shard][offset:][:2049]):
                return False
        return True

    before = len(list(Path("/proc/self/fd").iterdir()))
    with ShardSet(folder, "train", take_inventory(folder, "train"), files) as shards, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    files.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_another_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.train(["other text " * 9], 270).text)
    with pytest.raises(DataError, match=r"tokenizer\.json is not the tokenizer that made the shards"):
        ShardSet.open(folder, "train")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"cannot read .*tokenizer\.json: No such file"):
        ShardSet.open(folder, "train")


def test_shards_of_two_data_sets(folder: Path) -> None:
    rewrite(folder / "train-00001.h5", lambda arrays, attributes: attributes.update(tokenizer="0" * 64))
    with pytest.raises(DataError, match=r"train-00001\.h5 is of another data set than train-00000\.h5"):
        ShardSet.open(folder, "train")


def test_unknown_format_and_version(folder: Path) -> None:
    path = folder / "val-00000.h5"
    rewrite(path, lambda arrays, attributes: attributes.update(version=3))
    with pytest.raises(DataError, match="has version 3 of the shard format, this mpipar reads versions 1 and 2"):
        ShardSet.open(folder, "val")
    rewrite(path, lambda arrays, attributes: attributes.pop("format"))
    with pytest.raises(DataError, match="is not a shard of a data set"):
        ShardSet.open(folder, "val")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arrays, _: arrays["tokens"].__setitem__(7, VOCAB), "token 300 in a vocabulary of 300"),
        (lambda arrays, _: arrays["documents"].__setitem__(1, 10**6), "table of documents does not fit"),
        (lambda arrays, _: arrays["unigrams"].__setitem__(0, 10**6), "frequencies are not those"),
    ],
)
def test_verify_checks_what_the_arrays_say(folder: Path, change: Change, reason: str) -> None:
    path = folder / "train-00000.h5"
    rewrite(path, change)
    with Shard(path) as shard, pytest.raises(DataError, match=reason):
        shard.verify()


def test_full_disk(folder: Path, made_by: tokenizer.Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match=r"cannot write train-00009\.h5 .*No space left on device"):
        write_shard(folder, "train", 9, 10, documents_of(0), made_by, 1)
    assert not (folder / "train-00009.h5").exists()
