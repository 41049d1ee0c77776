"""What packing and importing have in common: a data set that is there already, its workshop, and what is said of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mpipar.comm import Communicator, decide_on_root
from mpipar.data.recipe import RECORD_FILE, holds
from mpipar.data.report import describe
from mpipar.data.shards import TOKENIZER_FILE, write_indices
from mpipar.data.skipped import LIST_FILE, in_words
from mpipar.data.survey import Survey
from mpipar.data.workshop import Workshop, workshop
from mpipar.errors import DataError
from mpipar.storage import atomic_file


def make(
    world: Communicator,
    out: Path,
    fingerprint: str,
    overwrite: bool,
    build: Callable[[Workshop], tuple[Survey, int]],
) -> None:
    """Collective: makes a data set at `out`, unless it is there, and prints what it holds.

    Args:
        world: All ranks.
        out: Where.
        fingerprint: Of what goes into it.
        overwrite: Replace another data set that is there.
        build: Writes it into the workshop; returns its survey, and how many shards were there before.

    Raises:
        DataError: `out` is taken, or what `build` raises.
    """
    started = time.monotonic()
    if decide_on_root(world, lambda: holds(out, fingerprint, overwrite)):
        verdict = ["already packed from this input with these settings: left as it is (--overwrite packs it again)"]
    else:
        with workshop(world, out, fingerprint) as shop:
            decide_on_root(world, lambda: _require_free(out, fingerprint, overwrite))
            found, num_before = build(shop)
            decide_on_root(world, lambda: write_indices(shop.folder))
        before = f", which went on from {num_before:,} finished shards" if num_before else ""
        seconds = time.monotonic() - started
        verdict = [f"packed in {seconds:.1f} s by {world.size} rank{'s' * (world.size > 1)}{before}"]
        if world.rank == 0:
            verdict += in_words(found.skipped, out / LIST_FILE)
    if world.rank == 0:
        print("\n".join([describe(out), *verdict]), flush=True)


def load_survey(world: Communicator, shop: Workshop, num_pieces: int) -> Survey | None:
    """Collective: the survey that an earlier attempt has left, if there is a whole one."""

    def load() -> Survey | None:
        try:
            found = Survey.load(shop.survey) if shop.survey.exists() else None
        except DataError:
            return None
        return found if found is not None and len(found.num_documents) == num_pieces else None

    return decide_on_root(world, load)


def keep(
    world: Communicator, shop: Workshop, found: Survey, record: Mapping[str, object], tokenizer: Callable[[], str]
) -> str:
    """Collective: writes down what is known before the first shard, so that another attempt has it.

    Args:
        world: All ranks.
        shop: Where.
        found: The survey.
        record: What pack.json says of the input.
        tokenizer: Gives the tokenizer's text, if there is none yet.

    Returns:
        The tokenizer's text.
    """
    path = shop.folder / TOKENIZER_FILE
    skipped = {"num_skipped": sum(found.skipped.values()), "skipped": found.skipped}

    def write() -> str:
        try:
            if not shop.survey.exists():
                found.save(shop.survey)
            if not path.exists():
                _write_text(path, tokenizer())
            _write_text(shop.folder / RECORD_FILE, json.dumps({**record, **skipped}, indent=2) + "\n")
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {error.filename or path}: {error.strerror}") from error

    return decide_on_root(world, write)


def _require_free(out: Path, fingerprint: str, overwrite: bool) -> None:
    """`out` was looked at before it was locked."""
    if holds(out, fingerprint, overwrite):
        raise DataError(f"--out {out} was packed by another process meanwhile: there is nothing left to do")


def _write_text(path: Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
