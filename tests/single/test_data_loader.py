"""The loader: microbatches are a function of step and index, read ahead or not; errors come out where batches do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpipar.data import Loader, Samples, Sequences, ShardSet, tokenizer, validation_loader
from mpipar.data.shard import write_shard
from mpipar.errors import DataError
from mpipar.storage import StoredArray

SEQ_LEN, MICROBATCH, NUM_MICROBATCHES = 16, 3, 4
SIZES = [1000, 30, 701]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    made_by = tokenizer.train(["some text " * 9], 270)
    (folder / "tokenizer.json").write_text(made_by.text)
    rng = np.random.default_rng(0)
    for index, size in enumerate(SIZES):
        tokens = rng.integers(0, made_by.vocab_size, size, dtype=np.uint32)
        write_shard(folder, "train", index, len(SIZES), [tokens], made_by, 1)
        write_shard(folder, "val", index, len(SIZES), [tokens[::-1]], made_by, 1)
    return folder


def samples_of(folder: Path, split: str = "train", **how: Any) -> Samples:
    return Samples([ShardSet.open(folder, split)], SEQ_LEN, 5, **how)


@pytest.fixture
def loader(folder: Path) -> Iterator[Loader]:
    with Loader(samples_of(folder), MICROBATCH, NUM_MICROBATCHES) as loader:
        yield loader


def tokens_of(loader: Loader, step: int, index: int) -> torch.Tensor:
    return loader.microbatch(step, index).tokens


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mpipar-loader")]


def test_microbatch_holds_the_samples_in_their_order(loader: Loader) -> None:
    for step, index in [(0, 0), (0, 3), (7, 1), (1000, 2)]:
        tokens = tokens_of(loader, step, index)
        assert tokens.dtype == torch.int64
        assert tokens.shape == (MICROBATCH, SEQ_LEN + 1)
        first = (step * NUM_MICROBATCHES + index) * MICROBATCH
        expected = [loader.samples.read(sample, 1).tokens for sample in range(first, first + MICROBATCH)]
        assert torch.equal(tokens, torch.cat(expected))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_together_see_every_microbatch_once(loader: Loader, num_ranks: int) -> None:
    for step in range(5):
        seen: dict[int, torch.Tensor] = {}
        for rank in range(num_ranks):
            mine = range(rank, NUM_MICROBATCHES, num_ranks)
            seen.update({batch.index: batch.sequences.tokens for batch in loader.microbatches(step, mine)})
        assert sorted(seen) == list(range(NUM_MICROBATCHES))
        assert all(torch.equal(seen[index], tokens_of(loader, step, index)) for index in seen)


def test_steps_may_be_taken_up_anywhere(loader: Loader) -> None:
    for step, mine in [(0, [0, 1]), (1, [0, 1]), (9, [3, 2, 1]), (2, [1]), (2, [1]), (3, [])]:
        batches = list(loader.microbatches(step, mine))
        assert [batch.index for batch in batches] == mine
        assert [batch.is_last for batch in batches] == [False] * (len(mine) - 1) + [True] * bool(mine)
        assert all(torch.equal(batch.sequences.tokens, tokens_of(loader, step, batch.index)) for batch in batches)


def test_indices_are_asked_for_one_ahead(loader: Loader) -> None:
    """What is claimed from a counter is not claimed before it is needed, nor so late that it has to be waited for."""
    asked = []

    def indices() -> Iterator[int]:
        for index in (3, 1, 2):
            asked.append(index)
            yield index

    batches = loader.microbatches(0, indices())
    assert asked == []
    for taken, expected in enumerate([[3, 1], [3, 1, 2], [3, 1, 2]]):
        assert next(batches).is_last == (taken == 2)
        assert asked == expected
    assert next(batches, None) is None


def test_the_next_batches_are_read_in_the_background(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = []
    read_into = StoredArray.read_into

    def spy(self: StoredArray, start: int, out: np.ndarray) -> None:
        readers.append(threading.current_thread() is threading.main_thread())
        read_into(self, start, out)

    monkeypatch.setattr(StoredArray, "read_into", spy)
    for step in range(4):
        assert len(list(loader.microbatches(step, [0, 2], then=[0]))) == 2
    assert sum(readers) == MICROBATCH  # here only the very first microbatch was read by the one who asked


def test_an_error_of_the_thread_comes_out_with_its_batch(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    microbatch = Loader._read

    def damaged(self: Loader, step: int, index: int) -> Sequences:
        if (step, index) == (1, 0):
            raise DataError("train-00000.h5 is damaged")
        return microbatch(self, step, index)

    monkeypatch.setattr(Loader, "_read", damaged)
    assert len(list(loader.microbatches(0, [0, 1], then=[0]))) == 2
    with pytest.raises(DataError, match="is damaged"):
        next(loader.microbatches(1, [0, 1]))


def test_close_ends_the_thread(folder: Path) -> None:
    before = loader_threads()
    for _ in range(20):
        with Loader(samples_of(folder), MICROBATCH, NUM_MICROBATCHES) as loader:
            next(loader.microbatches(0, [0, 1, 2]))
            assert len(loader_threads()) == len(before) + 1
    assert loader_threads() == before


def test_validation_is_fixed_and_within_the_split(folder: Path) -> None:
    runs = []
    for _ in range(2):
        with validation_loader(samples_of(folder, "val"), MICROBATCH, num_sequences=50) as loader:
            assert loader.num_microbatches == 16
            runs.append(torch.cat([tokens_of(loader, 0, index) for index in range(16)]))
    assert torch.equal(*runs)
    assert len({tuple(row.tolist()) for row in runs[0]}) == 48


def test_validation_takes_what_there_is(folder: Path) -> None:
    num_samples = sum(-(-(size - 1) // SEQ_LEN) for size in SIZES)
    with validation_loader(samples_of(folder, "val"), MICROBATCH, num_sequences=10**6) as loader:
        assert loader.num_microbatches == num_samples // MICROBATCH
    samples = samples_of(folder, "val")
    with pytest.raises(DataError, match="does not fill one microbatch of 1000"):
        validation_loader(samples, 1000, num_sequences=10**6)
    samples.close()
