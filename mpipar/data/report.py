"""What a data set holds, in a few lines, and whether all of it can be read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from mpipar.amounts import size
from mpipar.comm import Communicator, decide_on_root
from mpipar.data.progress import Progress
from mpipar.data.recipe import RECORD_FILE, read_fingerprint
from mpipar.data.shard import Shard
from mpipar.data.shards import ShardSet, shard_paths, splits_in, verify_index
from mpipar.errors import DataError


def describe(folder: Path) -> str:
    """The contents of a data set, as lines to print.

    Raises:
        DataError: There is no data set, or its shards do not belong together.
    """
    heads = f"{'shards':>7} {'documents':>11} {'text':>11} {'tokens':>15} {'bytes/token':>12} {'unigram entropy':>34}"
    lines = [f"data set {folder}", f"  {'split':5} {heads}"]
    for split in splits_in(folder):
        with ShardSet.open(folder, split) as shards:
            bytes_per_token = shards.text_bytes / shards.num_tokens
            nats = shards.unigram_entropy
            bits_per_byte = nats / math.log(2) / bytes_per_token
            entropy = f"{nats:.4f} nats/token, {bits_per_byte:.3f} bits/byte"
            lines.append(
                f"  {split:5} {len(shards.shards):7,} {shards.num_documents:11,} {size(shards.text_bytes):>11} "
                f"{shards.num_tokens:15,} {bytes_per_token:12.3f} {entropy:>34}"
            )
            if shards.num_counted < shards.num_tokens:
                share = shards.num_counted / shards.num_tokens
                lines.append(f"  {'':5} of its tokens {shards.num_counted:,} are of answers, and count ({share:.1%})")
            identity = f"tokenizer {shards.tokenizer_id[:12]}, vocabulary of {shards.vocab_size:,}"
            dtype = shards.shards[0].tokens.dtype
    return "\n".join([*lines, f"  {identity}, tokens stored as {dtype}"])


def verify(world: Communicator, folder: Path) -> list[str]:
    """Collective: reads every block of every shard, each on one rank. Returns all that is wrong, on all ranks.

    Raises:
        DataError: There is no data set.
    """
    paths = decide_on_root(world, lambda: [path for split in splits_in(folder) for path in shard_paths(folder, split)])
    mine = paths[world.rank :: world.size]
    problems: list[str] = []
    with Progress("verifying", sum(path.stat().st_size for path in mine), shown=world.rank == 0) as progress:
        for path in mine:
            with _noted(problems), Shard(path) as shard:
                shard.verify()
            progress.advance(path.stat().st_size)
    found = sorted(chain(*world.all_gather_object(problems)))
    # Damaged files have been named; whether the whole ones belong together is a question only where all are whole.
    return found or decide_on_root(world, lambda: _mismatches(folder))


def _mismatches(folder: Path) -> list[str]:
    problems: list[str] = []
    for split in splits_in(folder):
        with _noted(problems):
            ShardSet.open(folder, split).close()
            verify_index(folder, split)
    if (folder / RECORD_FILE).exists():
        with _noted(problems):
            read_fingerprint(folder)
    return problems


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """What is found wrong in the block is one problem more, and not the end."""
    try:
        yield
    except DataError as error:
        problems.append(str(error))
