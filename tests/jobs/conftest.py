"""Whole jobs under mpirun: what a user types, and what then happens to it."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.launch import run

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "it",
    "you",
    "that",
    "he",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
    "one",
    "had",
]

TINY = [
    "--model.layers",
    "1",
    "--model.dim",
    "32",
    "--model.heads",
    "2",
    "--model.max-seq-len",
    "64",
    "--train.seq-len",
    "32",
    "--train.global-batch",
    "4",
    "--train.microbatch",
    "1",
    "--train.eval-sequences",
    "4",
    "--train.warmup-steps",
    "2",
    "--run.log-every",
    "1",
    "--run.sample-tokens",
    "0",
    "--run.tensorboard",
    "false",
]


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty files of words in an order that has some structure."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder


def write_text(folder: Path) -> None:
    """Writes them."""
    rng = random.Random(1)
    for i in range(20):
        words = [WORDS[(j * (i + 1) + rng.randrange(3)) % len(WORDS)] for j in range(1500)]
        (folder / f"{i}.txt").write_text(" ".join(words), "utf-8")


@pytest.fixture(scope="session")
def data(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set. Tests that damage one make a copy."""
    out = tmp_path_factory.mktemp("data") / "words"
    run(2, "-m", "mpipar.data", "pack", str(text_folder), "--out", str(out), *["--vocab-size", "300"]).ok()
    return out


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a small training run: train("--train.steps", 5, folder="a")."""

    def arguments(*more: object, folder: str = "run") -> list[str]:
        places = ["--data.dir", str(data), "--run.dir", str(tmp_path / folder)]
        return ["-m", "mpipar.train", *places, *TINY, *map(str, more)]

    return arguments
