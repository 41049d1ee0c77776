"""Question: how fast is text packed, a core, and where does the time go?

Python's standard library, as JSON lines, is packed by a tokenizer that was trained on it. Times are of the processor
and not of the clock, so that other programs on the machine count for less; with several ranks each does a part, and the
slowest one's time is taken.

    parts      what packing is made of: each by itself, on documents that are in memory
    pack       all of it: survey, plan, tokens, shards with their checksums, flushed
    peer       what a script does: json, `tokenizers`' encode_batch in one thread a rank, a numpy memmap; no survey
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from benchmarks.machine import begin, comments
from benchmarks.measure import Seconds, ratio, take_turns
from mpipar.comm import Communicator, agreement, decide_on_root
from mpipar.data import tokenizer
from mpipar.data.corpus import STDLIB, Piece, cut, list_files
from mpipar.data.dedup import content_hash, sketch
from mpipar.data.documents import read_documents
from mpipar.data.pack import pack
from mpipar.data.recipe import PackSettings
from mpipar.data.skipped import PieceError, Tally
from mpipar.errors import ConfigError

_BATCH_BYTES = 1 << 20
_PACK, _PEER = "pack: both passes", "peer: json, encode_batch, memmap"


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Compares packing with `tokenizers` alone, and says where its time goes."""

    megabytes: int = 20
    """Of text; at most as much as the standard library has."""
    vocab_size: int = 32000
    """Of the tokenizer that is trained on it."""
    rounds: int = 3
    """Measurements."""
    folder: Path | None = None
    """Where text and data sets are made and removed again; the system's folder for temporary files if not given."""

    def run(self, world: Communicator) -> None:
        """Measures and prints. Collective."""
        with agreement(world):
            self._validate()
        _, environment = begin(world)
        tokenizer.limit_threads(1)
        with self._text(world) as folder:
            contestants = _contestants(world, folder, self.rounds)
            times = take_turns(world, contestants, rounds=self.rounds, warmup=0, clock=time.process_time)
            megabytes = sum(len(text) for text in _documents(_pieces(folder))) / 1e6
        if world.rank == 0:
            print("\n".join([environment.header(), *_table(times, megabytes / world.size)]), flush=True)

    def _validate(self) -> None:
        for name, least in (("megabytes", 1), ("vocab_size", tokenizer.MIN_VOCAB_SIZE), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {least}")

    @contextmanager
    def _text(self, world: Communicator) -> Iterator[Path]:
        """Collective: a folder with text.jsonl and tokenizer.json, for as long as the block lasts."""
        folder = decide_on_root(world, lambda: Path(tempfile.mkdtemp(prefix="mpipar-benchmark-", dir=self.folder)))
        try:
            decide_on_root(world, lambda: self._write_text(folder))
            yield folder
            world.barrier()
        finally:
            if world.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def _write_text(self, folder: Path) -> None:
        texts, left = [], self.megabytes * 1_000_000
        for document in _documents(cut(list_files([STDLIB], folder, []), "text", [])):
            texts.append(document.decode("utf-8"))
            left -= len(document)
            if left <= 0:
                break
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "text.jsonl").write_text(lines, "utf-8")
        (folder / "tokenizer.json").write_text(tokenizer.train(texts, self.vocab_size).text, "utf-8")


def _contestants(world: Communicator, folder: Path, rounds: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; so many times at most."""
    text = (folder / "tokenizer.json").read_text("utf-8")
    pieces = _pieces(folder)[world.rank :: world.size]
    documents = list(_documents(pieces))
    batches = list(_batches(documents))
    backend = Backend.from_str(text)
    seen, *fresh = (tokenizer.Tokenizer(text) for _ in range(1 + rounds))
    for made_by in fresh:
        made_by.encode([b""])  # reads its merges

    def encode(made_by: tokenizer.Tokenizer) -> None:
        for batch in batches:
            made_by.encode(batch)

    def pack_all() -> None:
        settings = PackSettings(tokenizer=str(folder / "tokenizer.json"))
        with redirect_stdout(io.StringIO()):
            pack(world, [str(folder / "text.jsonl")], folder / "packed", settings, overwrite=True)

    encode(seen)
    return {
        "JSON to documents": lambda: sum(map(len, _documents(pieces))),
        "content hash": lambda: [content_hash(document) for document in documents],
        "sketch": lambda: [sketch(batch) for batch in batches],
        "tokens, no word seen before": lambda: encode(fresh.pop()),
        "tokens, all words seen": lambda: encode(seen),
        "tokens, by the tokenizer": lambda: [_encode_batch(backend, batch) for batch in batches],
        _PACK: pack_all,
        _PEER: lambda: _pack_simply(pieces, backend, folder / f"peer-{world.rank}.bin"),
    }


def _pack_simply(pieces: Sequence[Piece], backend: Backend, path: Path) -> None:
    """Tokens of all documents in one file, as training scripts make it."""
    rows = [ids for batch in _batches(list(_documents(pieces))) for ids in _encode_batch(backend, batch)]
    dtype = np.uint16 if backend.get_vocab_size() <= 1 << 16 else np.uint32
    tokens = np.memmap(path, dtype, mode="w+", shape=(max(1, sum(map(len, rows))),))
    at = 0
    for ids in rows:
        tokens[at : at + len(ids)] = ids
        at += len(ids)
    tokens.flush()


def _encode_batch(backend: Backend, batch: Sequence[bytes]) -> list[list[int]]:
    texts = [document.decode("utf-8") for document in batch]
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _pieces(folder: Path) -> list[Piece]:
    return cut(list_files([str(folder / "text.jsonl")], folder / "packed", []), "text", [])


def _documents(pieces: Sequence[Piece]) -> Iterator[bytes]:
    for piece in pieces:
        with suppress(PieceError):  # the standard library has a file or two that are not UTF-8, to test with
            yield from read_documents(piece, "text", Tally())


def _batches(documents: Sequence[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for document in documents:
        batch.append(document)
        if sum(map(len, batch)) >= _BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _table(times: dict[str, Seconds], megabytes: float) -> list[str]:
    """A line for each part.

    Args:
        times: In seconds of the processor, by part.
        megabytes: Of text, that a rank has of it.
    """
    middle, low, high = ratio(times[_PEER], times[_PACK])
    lines = [f"  {name:34} {megabytes / float(np.median(seconds)):9.1f}" for name, seconds in times.items()]
    return [
        comments(
            [
                f"{megabytes:.1f} MB of text a rank; MB/s of processor time, medians of {len(times[_PACK])} rounds",
                f"packing is {middle:.1f} times as fast as the peer ({low:.1f} to {high:.1f}, quartiles)",
                f"{'what':34} {'MB/s a core':>11}",
            ]
        ),
        *lines,
    ]
