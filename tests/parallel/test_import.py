"""Importing Megatron's tokens: every document once, the same bits at every rank count, bad files told once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpipar.comm import Communicator
from mpipar.data import ShardSet, Tokenizer, tokenizer
from mpipar.data.importing import import_megatron
from mpipar.data.report import verify
from mpipar.data.skipped import Skip, read_list
from tests.megatron_files import write_megatron
from tests.parallel.test_pack import content, documents, on_root, refused, story

NUM = 300


@pytest.fixture
def made_by(comm: Communicator, shared_path: Path) -> Tokenizer:
    made = tokenizer.train([story(number) for number in range(20)], 400)
    on_root(comm, lambda: (shared_path / "tokenizer.json").write_text(made.text))
    return made


def write(made_by: Tokenizer, folder: Path, dtype: str = "uint16") -> None:
    """Every second document ends with an end of text; some are of two sequences, some are empty."""
    encoded = [ids.tolist() for ids in made_by.encode([story(number).encode() for number in range(NUM)])]
    cut = [[ids[:100], ids[100:-1]] if number % 3 else [ids] for number, ids in enumerate(encoded)]
    cut[7:7] = [[[]], [[made_by.end_of_text]], []]
    write_megatron(folder / "tokens", cut, dtype)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_every_document_once(comm: Communicator, shared_path: Path, made_by: Tokenizer, dtype: str) -> None:
    on_root(comm, lambda: write(made_by, shared_path, dtype))

    def import_it(ranks: Communicator, name: str) -> Path:
        import_megatron(ranks, shared_path / "tokens", shared_path / name, shared_path / "tokenizer.json", 0.1)
        return shared_path / name

    out = import_it(comm, "together")
    train, val = documents(out, "train"), documents(out, "val")
    assert sorted(train + val) == sorted(story(number) for number in range(NUM))
    assert 15 <= len(val) <= 50
    with ShardSet.open(out, "train") as shards:
        assert shards.text_bytes == sum(len(text.encode()) for text in train)
        assert shards.tokenizer_id == made_by.identity
    assert verify(comm, out) == []
    assert list(read_list(out / "skipped.jsonl")) == [
        Skip(f"{shared_path}/tokens.bin", number, "empty", "") for number in (8, 9, 10)
    ]
    alone = comm.split("alone", comm.rank, 0)
    assert content(import_it(alone, f"alone{comm.rank}")) == content(out)
    alone.free()


def test_copies_are_on_the_same_side(comm: Communicator, shared_path: Path, made_by: Tokenizer) -> None:
    texts = [ids.tolist() for ids in made_by.encode([story(number % 40).encode() for number in range(160)])]
    on_root(comm, lambda: write_megatron(shared_path / "tokens", [[text] for text in texts]))
    import_megatron(comm, shared_path / "tokens", shared_path / "out", shared_path / "tokenizer.json", 0.2)
    train, val = documents(shared_path / "out", "train"), documents(shared_path / "out", "val")
    assert len(train) + len(val) == 160
    assert val
    assert not set(train) & set(val)


def test_few_documents(comm: Communicator, shared_path: Path, made_by: Tokenizer) -> None:
    def import_it(name: str, val_fraction: float) -> None:
        import_megatron(comm, shared_path / "tokens", shared_path / name, shared_path / "tokenizer.json", val_fraction)

    on_root(comm, lambda: write_megatron(shared_path / "tokens", [[[5, 6, 7]], [[8, 9]]]))
    import_it("two", 0.01)
    assert [len(documents(shared_path / "two", split)) for split in ("train", "val")] == [1, 1]
    comm.barrier()
    on_root(comm, lambda: write_megatron(shared_path / "tokens", [[[5, 6, 7]]]))
    refused(comm, "there is one document", lambda: import_it("one", 0.01))
    import_it("one", 0.0)
    assert len(documents(shared_path / "one", "train")) == 1


def test_bad_files(comm: Communicator, shared_path: Path, made_by: Tokenizer) -> None:
    def import_it() -> None:
        import_megatron(comm, shared_path / "tokens", shared_path / "out", shared_path / "tokenizer.json", 0.1)

    refused(comm, r"tokens\.idx: No such file", import_it)
    tokens = np.full(50, 7).tolist()
    on_root(comm, lambda: write_megatron(shared_path / "tokens", [[tokens], [[1, made_by.vocab_size]]]))
    refused(comm, r"tokens\.bin: token \d+ in document 2, where the vocabulary of the tokenizer has \d+", import_it)
    on_root(comm, lambda: write_megatron(shared_path / "tokens", [[tokens], [[1, -1]]], "int32"))
    refused(comm, r"token -1 in document 2", import_it)
    on_root(comm, lambda: write_megatron(shared_path / "tokens", [[[]], []]))
    refused(comm, "the files hold no documents but empty ones", import_it)
    comm.barrier()
    assert sorted(path.name for path in shared_path.iterdir()) == ["tokenizer.json", "tokens.bin", "tokens.idx"]
