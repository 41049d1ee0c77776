"""The command `python -m mpipar.data pack | import | info | verify`, alone or under mpirun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mpipar.amounts import plural
from mpipar.comm import Communicator, decide_on_root, run_job
from mpipar.command_line import parse_one_of
from mpipar.data.importing import import_megatron
from mpipar.data.pack import pack
from mpipar.data.recipe import PackSettings
from mpipar.data.report import describe, verify

_DESCRIPTION = """Makes data sets of text for mpipar.train, and looks into them.

Text of your own:  python -m mpipar.data pack book.txt notes/ crawl.jsonl.gz --out data/mine

The same, faster:  mpirun -n 8 python -m mpipar.data pack ...  (the result has the same bits)

Conversations:     python -m mpipar.data pack chats.jsonl --chat chatml --tokenizer tokenizer.json --out data/chats

No text at hand:   python -m mpipar.data pack stdlib --out data/stdlib

Tokens, already:   python -m mpipar.data import megatron PREFIX --tokenizer tokenizer.json --out data/mine"""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Pack text into a data set.

    An input is a text file, a .jsonl file (one document a line), either of them with .gz, a .parquet file (one document
    a row; needs pyarrow), a folder of such files, or the word `stdlib` for the Python standard library of this
    interpreter. A text file is one document; a long one is cut into several. What cannot be read is skipped, and listed
    in skipped.jsonl. Packing the same again does nothing, and after a kill only what is missing.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")]
    """Files, folders, or `stdlib`."""
    out: Path
    """The folder of the data set. It appears when the set is whole."""
    vocab_size: int = 4096
    """The size of the vocabulary to train."""
    tokenizer: str | None = None
    """A tokenizer.json of the Hugging Face `tokenizers` library to use with its own vocabulary, instead of training."""
    val_fraction: float = 0.05
    """The share of the text that is kept for validation: whole documents that resemble no other, chosen by content."""
    text_field: str = "text"
    """The field of a JSON line, or the column of a Parquet file, that holds the text."""
    chat: str | None = None
    """The lines of .jsonl files are conversations, {"messages": [{"role": "user", "content": "..."}, ...]}, and only
    the answers count in the loss. A template: chatml, llama3, plain, or a TOML file (docs/pack.md). Needs
    --tokenizer."""
    overwrite: bool = False
    """Replace the data set that is at --out."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a data set of tokens that another program has prepared.

    `import megatron PREFIX` reads PREFIX.bin and PREFIX.idx, as Megatron-LM's preprocess_data.py writes them. Every
    document gets an end of text, unless it has one.
    """

    format: Annotated[Literal["megatron"], tyro.conf.Positional]
    """Whose tokens they are."""
    prefix: Annotated[Path, tyro.conf.Positional]
    """What the files' names begin with."""
    out: Path
    """The folder of the data set. It appears when the set is whole."""
    tokenizer: Path
    """The tokenizer.json, of the Hugging Face `tokenizers` library, with which the tokens were made."""
    val_fraction: float = 0.05
    """The share of the documents that is kept for validation, chosen by content."""
    overwrite: bool = False
    """Replace the data set that is at --out."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Show what a data set holds, and the entropy of its tokens: the loss of a model that knows only frequencies."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The data set."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read every block of a data set and check it. The exit code is 1 if anything is damaged."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The data set."""


Command = Pack | Import | Info | Verify

_COMMANDS: dict[str, type[Command]] = {"pack": Pack, "import": Import, "info": Info, "verify": Verify}


def main(world: Communicator) -> int:
    command = decide_on_root(world, lambda: parse_one_of(_COMMANDS, "python -m mpipar.data", description=_DESCRIPTION))
    if isinstance(command, Pack):
        settings = PackSettings(
            vocab_size=command.vocab_size,
            tokenizer=command.tokenizer,
            val_fraction=command.val_fraction,
            text_field=command.text_field,
            chat=command.chat,
        )
        pack(world, command.inputs, command.out, settings, command.overwrite)
        return 0
    if isinstance(command, Import):
        import_megatron(world, command.prefix, command.out, command.tokenizer, command.val_fraction, command.overwrite)
        return 0
    if isinstance(command, Info):
        text = decide_on_root(world, lambda: describe(command.folder))
        if world.rank == 0:
            print(text)
        return 0
    return _verify(world, command.folder)


def _verify(world: Communicator, folder: Path) -> int:
    problems = verify(world, folder)
    if world.rank == 0:
        for problem in problems:
            print(problem)
        print(f"{folder}: {plural(len(problems), 'problem') if problems else 'all is well'}")
    return 1 if problems else 0


if __name__ == "__main__":
    run_job(main)
