"""A data set of a few hundred random tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpipar.data import tokenizer
from mpipar.data.shards import write_shard


def write_small_data(folder: Path) -> None:
    """Writes it, with its tokenizer. On one rank."""
    folder.mkdir()
    made_by = tokenizer.train(["some text " * 9], 270)
    (folder / "tokenizer.json").write_text(made_by.text)
    tokens = np.random.default_rng(0).integers(0, made_by.vocab_size, 900, dtype=np.uint32)
    for split in ("train", "val"):
        write_shard(folder, split, 0, 1, [tokens], made_by, 1)
