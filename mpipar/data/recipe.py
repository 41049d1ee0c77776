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
from mpipar.data.conversations import ChatEncoder
from mpipar.data.corpus import STDLIB, Piece, SourceFile, cut, list_files
from mpipar.data.documents import Form
from mpipar.data.shards import ShardSet, splits_in
from mpipar.data.skipped import Skip
from mpipar.data.templates import Template, find_template
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
        chat: The template of conversations, by name or as the path of a TOML file; None for text.
    """

    vocab_size: int = 4096
    tokenizer: str | None = None
    val_fraction: float = 0.05
    text_field: str = "text"
    chat: str | None = None

    def __post_init__(self) -> None:
        check_fraction(self.val_fraction)
        if self.tokenizer is None and self.vocab_size < tokenizer.MIN_VOCAB_SIZE:
            raise ConfigError(
                f"--vocab-size {self.vocab_size} is too small: the 256 bytes and the end of text are in every "
                f"vocabulary, so the least is {tokenizer.MIN_VOCAB_SIZE}"
            )
        if self.chat is not None and self.tokenizer is None:
            raise ConfigError("--chat needs --tokenizer: that of the model which the conversations are for")


@dataclass(frozen=True)
class Recipe:
    """Everything that packing needs to know of the outside world, read once, on one rank.

    Attributes:
        settings: As given.
        pieces: The input, cut for the ranks to share.
        skipped: Input files that could not even be listed.
        tokenizer: The content of the given tokenizer.json, or None to train one.
        template: Of conversations; None for text.
        record: What pack.json will say.
    """

    settings: PackSettings
    pieces: list[Piece]
    skipped: list[Skip]
    tokenizer: str | None
    template: Template | None
    record: dict[str, object]

    @property
    def fingerprint(self) -> str:
        """Changes with every name, size or time of an input file, and with every setting."""
        return str(self.record["fingerprint"])

    @property
    def form(self) -> Form:
        """Of the input's records."""
        return self.settings.text_field if self.template is None else self.template


def prepare(inputs: Sequence[str], out: Path, settings: PackSettings) -> Recipe:
    """Lists the inputs.

    Raises:
        DataError: An input is missing or is no tokenizer, or the template does not go with the tokenizer.
        ConfigError: There is no input or template, or one that cannot be read by what is installed.
    """
    if not inputs:
        raise ConfigError(f"nothing to pack: give files, folders, or the word {STDLIB!r}")
    skipped: list[Skip] = []
    template = find_template(settings.chat) if settings.chat is not None else None
    files = list_files(inputs, out, skipped)
    if template is not None:
        files = _with_conversations(files, skipped)
    if not files:
        reasons = "".join(f"\n  {skip}" for skip in skipped[:10])
        wanted = "text" if template is None else "conversations"
        raise DataError(f"the inputs hold no {wanted}: there is no file in them that can be read" + reasons)
    made_by = tokenizer.load(Path(settings.tokenizer)) if settings.tokenizer else None
    if template is not None and made_by is not None:
        ChatEncoder(template, made_by)  # raises an error where they do not go together
    given = made_by.text if made_by else None
    record: dict[str, object] = {
        "fingerprint": _fingerprint(files, settings, given, template),
        "inputs": list(inputs),
        "num_files": len(files),
        "settings": asdict(settings),
    }
    return Recipe(settings, cut(files, settings.text_field, skipped), skipped, given, template, record)


def _with_conversations(files: Sequence[SourceFile], skipped: list[Skip]) -> list[SourceFile]:
    others = [file for file in files if file.kind != "jsonl"]
    skipped += [Skip(file.path, None, "no messages", "conversations are read from .jsonl files") for file in others]
    return [file for file in files if file.kind == "jsonl"]


def _fingerprint(
    files: Sequence[SourceFile], settings: PackSettings, given_tokenizer: str | None, template: Template | None
) -> str:
    states = [(os.path.abspath(file.path), file.num_bytes, file.modified_ns) for file in files]
    values = asdict(settings)
    del values["chat"]  # what the template says counts, not its name
    identity = [_METHOD, values, given_tokenizer, states, *([] if template is None else [asdict(template)])]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


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
    if read_fingerprint(out) != fingerprint:
        raise DataError(
            f"--out {out} holds a data set that was packed from other input or with other settings. Use --overwrite to "
            "replace it, or choose another folder"
        )
    for split in splits_in(out):
        ShardSet.open(out, split).close()
    return True


def read_fingerprint(folder: Path) -> str:
    """Of what a data set was packed from. Raises DataError if its record is damaged."""
    try:
        return str(json.loads((folder / RECORD_FILE).read_text("utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / RECORD_FILE}, which says what the data set was packed from, cannot be read. Training does not "
            "need it; to pack the same again use --overwrite, or choose another folder"
        ) from error
