"""What a data set is made of: the input files and the settings, and whether a folder holds what they make.

The recipe's fingerprint goes into pack.json beside the shards. Packing the same again is then an answer and no work,
and a folder that holds anything else is never overwritten by accident.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mpipar.data import tokenizer
from mpipar.data.corpus import STDLIB, Piece, SourceFile, cut, list_files
from mpipar.data.shards import ShardSet, splits_in
from mpipar.data.skipped import Skip
from mpipar.errors import ConfigError, DataError

RECORD_FILE = "pack.json"

_METHOD = 2  # part of the fingerprint: counts up whenever the same input is packed into other bits


def check_fraction(val_fraction: float) -> None:
    """Raises ConfigError for what is not a share of the text that may be kept for validation."""
    if not 0 <= val_fraction <= 0.5:
        raise ConfigError(f"--val-fraction {val_fraction} is not a share of the text: give 0 to 0.5")


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What decides the bits of a data set, beside the input.

    Attributes:
        vocab_size: The size of the vocabulary to train. A given tokenizer has its own.
        tokenizer: The path of a tokenizer.json to use instead of training one.
        val_fraction: The share of the text that is kept for validation.
        text_field: The field of a JSON line, or the column of a Parquet file, that holds the text.
    """

    vocab_size: int = 4096
    tokenizer: str | None = None
    val_fraction: float = 0.05
    text_field: str = "text"

    def __post_init__(self) -> None:
        check_fraction(self.val_fraction)
        if self.tokenizer is None and self.vocab_size < tokenizer.MIN_VOCAB_SIZE:
            raise ConfigError(
                f"--vocab-size {self.vocab_size} is too small: the 256 bytes and the end of text are in every "
                f"vocabulary, so the least is {tokenizer.MIN_VOCAB_SIZE}"
            )


@dataclass(frozen=True)
class Recipe:
    """Everything that packing needs to know of the outside world, read once, on one rank.

    Attributes:
        settings: As given.
        pieces: The input, cut for the ranks to share.
        skipped: Input files that could not even be listed.
        tokenizer: The content of the given tokenizer.json, or None to train one.
        record: What pack.json will say.
    """

    settings: PackSettings
    pieces: list[Piece]
    skipped: list[Skip]
    tokenizer: str | None
    record: dict[str, object]

    @property
    def fingerprint(self) -> str:
        """Changes with every name, size or time of an input file, and with every setting."""
        return str(self.record["fingerprint"])


def prepare(inputs: Sequence[str], out: Path, settings: PackSettings) -> Recipe:
    """Lists the inputs.

    Raises:
        DataError: An input is missing or is no tokenizer.
        ConfigError: There is no input, or one that cannot be read by what is installed.
    """
    if not inputs:
        raise ConfigError(f"nothing to pack: give files, folders, or the word {STDLIB!r}")
    skipped: list[Skip] = []
    files = list_files(inputs, out, skipped)
    if not files:
        reasons = "".join(f"\n  {skip}" for skip in skipped[:10])
        raise DataError("the inputs hold no text: there is no file in them that can be read" + reasons)
    given = tokenizer.load(Path(settings.tokenizer)).text if settings.tokenizer else None
    record: dict[str, object] = {
        "fingerprint": _fingerprint(files, settings, given),
        "inputs": list(inputs),
        "num_files": len(files),
        "settings": asdict(settings),
    }
    return Recipe(settings, cut(files, settings.text_field, skipped), skipped, given, record)


def _fingerprint(files: Sequence[SourceFile], settings: PackSettings, given_tokenizer: str | None) -> str:
    states = [(os.path.abspath(file.path), file.num_bytes, file.modified_ns) for file in files]
    return hashlib.sha256(json.dumps([_METHOD, asdict(settings), given_tokenizer, states]).encode()).hexdigest()


def holds(out: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether `out` holds the data set with this fingerprint; False where it is free to be written.

    Raises:
        DataError: It holds something else.
    """
    if not out.exists():
        return False
    if not out.is_dir():
        raise DataError(f"--out {out} is a file; a data set is a folder")
    if not any(out.iterdir()):
        return False
    if not (out / RECORD_FILE).is_file():
        raise DataError(f"--out {out} holds other files, and no data set that was made here: choose another folder")
    if overwrite:
        return False
    try:
        same = json.loads((out / RECORD_FILE).read_text())["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DataError(
            f"--out {out} holds a data set that was packed from other input or with other settings. Use --overwrite to "
            "replace it, or choose another folder"
        )
    for split in splits_in(out):
        ShardSet.open(out, split).close()
    return True
