"""Samples: what a run reads is a function of their numbers; each window, and with it each document, in its turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpipar.data import Samples, ShardSet, Tokenizer, tokenizer
from mpipar.data.shard import write_shard
from mpipar.errors import DataError

SEQ_LEN = 8


@pytest.fixture(scope="module")
def made_by() -> Tokenizer:
    return tokenizer.train(["some text " * 9], 270)


Write = Callable[[list[list[int]]], ShardSet]
"""Writes a data set of shards of documents of these lengths, and opens it."""


@pytest.fixture
def write(tmp_path_factory: pytest.TempPathFactory, made_by: Tokenizer) -> Iterator[Write]:
    opened: list[ShardSet] = []

    def write(shards: list[list[int]], made_by: Tokenizer = made_by) -> ShardSet:
        folder = tmp_path_factory.mktemp("set")
        (folder / "tokenizer.json").write_text(made_by.text)
        rng = np.random.default_rng(len(opened))
        for index, lengths in enumerate(shards):
            documents = [rng.integers(1, 260, length, dtype=np.uint32) for length in lengths]
            for document in documents:
                document[document == made_by.end_of_text] = 1
                document[-1] = made_by.end_of_text
            write_shard(folder, "train", index, len(shards), documents, made_by, 1)
        opened.append(ShardSet.open(folder, "train"))
        return opened[-1]

    yield write
    for shards in opened:
        shards.close()


SHARDS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=4).filter(
    lambda shards: any(sum(lengths) > 1 for lengths in shards)
)


@settings(max_examples=25)
@given(shards=SHARDS, seed=st.integers(0, 2**40))
def test_every_document_once_before_any_twice(write: Write, shards: list[list[int]], seed: int) -> None:
    """Of the predictions that count each is made once an epoch, wherever its document lies, and whatever its length."""
    source = write(shards)
    samples = Samples([source], SEQ_LEN, seed)
    for epoch in range(3):
        seen: Counter[tuple[int, int]] = Counter()  # (shard, token)
        first = epoch * samples.num_samples
        tokens, _, counted = samples.read(first, samples.num_samples)
        if counted is None:
            counted = torch.ones(tokens[:, 1:].shape, dtype=torch.bool)
        for row, counts, _, shard, offset in zip(
            tokens, counted, *samples.locate(first, samples.num_samples), strict=True
        ):
            num = int(counts.sum())
            assert counts[:num].all() and num >= 1
            assert row[: num + 1].tolist() == source.read(shard, offset, num + 1).tolist()
            seen.update((shard, offset + 1 + t) for t in range(num))
        assert seen == Counter((s, t) for s, lengths in enumerate(shards) for t in range(1, sum(lengths)))


@settings(max_examples=8)
@given(
    sources=st.lists(SHARDS, min_size=2, max_size=3),
    weights=st.none() | st.lists(st.integers(1, 9), min_size=3, max_size=3),
    num_ranks=st.integers(1, 7),
)
def test_every_source_in_its_turn_at_every_rank_count(
    write: Write, sources: list[list[list[int]]], weights: list[int] | None, num_ranks: int
) -> None:
    sets = [write(shards) for shards in sources]
    weights = weights[: len(sets)] if weights else []
    samples = Samples(sets, SEQ_LEN, 3, weights=weights)
    shares = np.array(weights or [order.num_samples for order in samples.orders])
    num = 4 * samples.num_samples
    one_rank = samples.read(0, num).tokens
    places = list(zip(*samples.locate(0, num), strict=True))
    for rank in range(num_ranks):
        own = Samples(sets, SEQ_LEN, 3, weights=weights)
        mine = [own.read(index, 1).tokens for index in range(rank, num, num_ranks)]
        assert not mine or torch.equal(torch.cat(mine), one_rank[rank::num_ranks])
    for number, order in enumerate(samples.orders):
        of_source = [place[1:] for place in places if place[0] == number]
        assert abs(len(of_source) - num * shares[number] / shares.sum()) < 1.7
        for begin in range(0, len(of_source), order.num_samples):
            passes = of_source[begin : begin + order.num_samples]
            assert len(set(passes)) == len(passes)  # no window twice before all once


def test_a_source_ends(write: Write) -> None:
    sets = [write([[40, 40]]), write([[90]])]
    samples = Samples(sets, SEQ_LEN, 3, weights=[1, 1], epochs=[2, 0])
    sources, _, _ = samples.locate(0, 100)
    assert sources[:40].count(0) == 20 and set(sources[40:]) == {1}
    assert Samples(sets, SEQ_LEN, 3, epochs=[2, 1]).mixture.num_samples == 20 + 12


def test_as_much_of_each_as_there_is(write: Write) -> None:
    """Without weights several data sets are read as one: none is seen twice before all are seen once."""
    sets = [write([[40, 41]]), write([[900]]), write([[17], [30]])]
    samples = Samples(sets, SEQ_LEN, 3)
    for epoch in range(3):
        places = zip(*samples.locate(epoch * samples.num_samples, samples.num_samples), strict=True)
        assert len(set(places)) == samples.num_samples == 10 + 113 + 2 + 4


def test_documents_begin_at_ends_of_text(write: Write, made_by: Tokenizer) -> None:
    shards = write([[5, 1, 30, 3, 3, 9]])
    tokens, begins, _ = Samples([shards], SEQ_LEN, 0, end_of_text=made_by.end_of_text).read(0, 6)
    assert begins is not None
    assert torch.equal(begins, tokens[:, :-1] == made_by.end_of_text)
    assert Samples([shards], SEQ_LEN, 0).read(0, 6).begins is None


def test_several_tokenizers_are_refused(write: Callable[..., ShardSet]) -> None:
    one, other = write([[40]]), write([[40]], tokenizer.train(["other words " * 9], 280))
    with pytest.raises(DataError, match=r"packed with another tokenizer .*pack it again with --tokenizer"):
        Samples([one, other], SEQ_LEN, 0)


def test_damage_is_named(write: Write) -> None:
    shards = write([[400]])
    path: Path = shards.shards[0].path
    content = bytearray(path.read_bytes())
    content[content.index(shards.read(0, 0, 50).tobytes())] ^= 1
    path.write_bytes(content)
    fresh = ShardSet.open(shards.folder, "train")
    with pytest.raises(DataError, match=r"train-00000\.h5: array 'tokens' is damaged"):
        Samples([fresh], SEQ_LEN, 0).read(0, 4)
    fresh.close()
