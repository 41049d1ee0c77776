"""A vocabulary that 16 bits do not hold, from text to a training step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpipar.data import ShardSet, Tokenizer, tokenizer
from tests.jobs.launch import run

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A tokenizer of all bytes, an end of text, and all pairs of bytes, those of letters last."""
    content = json.loads(tokenizer.train(["text"], tokenizer.MIN_VOCAB_SIZE).text)
    vocabulary = {token: number for token, number in content["model"]["vocab"].items() if len(token) == 1}
    vocabulary = {token: number for number, token in enumerate([tokenizer.END_OF_TEXT, *sorted(vocabulary)])}
    letters = [token for token in vocabulary if len(token) == 1]
    letters.sort(key=lambda token: (token.isascii() and token.isalpha(), token))
    pairs = [(one, other) for one in letters for other in letters]
    vocabulary.update({one + other: len(vocabulary) + i for i, (one, other) in enumerate(pairs)})
    content["model"].update(vocab=vocabulary, merges=pairs)
    path = tmp_path / "wide.json"
    path.write_text(json.dumps(content))
    return path


def test_from_text_to_a_step(train: Callable[..., list[str]], wide: Path, tmp_path: Path) -> None:
    made_by = tokenizer.load(wide)
    assert made_by.vocab_size == 256 + 256**2 + 1
    texts = [f"zebras {number} zigzag by zoos, yes, zzz {number * number}" for number in range(2000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "packed"
    run(2, "-m", "mpipar.data", "pack", f"{tmp_path}/in.jsonl", "--out", f"{out}", "--tokenizer", f"{wide}").ok()
    run(2, "-m", "mpipar.data", "verify", f"{out}").ok()
    found = []
    for split in ("train", "val"):
        with ShardSet.open(out, split) as shards:
            found += documents(shards, made_by)
    assert sorted(found) == sorted(texts)
    said = run(2, *train("--data.dir", out, "--train.steps", 2)).ok().text
    assert "65,793" in said, said


def documents(shards: ShardSet, made_by: Tokenizer) -> list[str]:
    found = []
    for shard in shards.shards:
        tokens, bounds = shard.tokens.array(), shard.read_documents()
        assert tokens.dtype == np.uint32
        assert tokens.max() > 0xFFFF
        found += [made_by.decode(part[:-1].tolist()) for part in np.split(tokens, bounds[1:-1])]
    return found
