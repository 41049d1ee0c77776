"""Command lines. A dataclass says which options there are, tyro reads them; a mistake is one ConfigError.

tyro frames its messages, wraps them to the width of a terminal and ends the process. Here its words are taken out of
the frame and become the message of an error, which is printed by one rank, on one line, as all others are:

    ╭─ Unrecognized options ──────────────────────╮
    │ Unrecognized options: --train.stepss, 3     │
    │ ─────────────────────────────────────────── │      unrecognized options: --train.stepss, 3. Perhaps you meant:
    │ Perhaps you meant:                          │  ->  --train.steps INT. For full helptext, ...
    │     --train.steps INT                       │
    │         Optimizer steps of the whole run.   │
"""

from __future__ import annotations

import ast
import inspect
import io
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial, reduce
from itertools import pairwise
from operator import or_
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from mpipar.errors import ConfigError, MpiparError

Form = TypeVar("Form")

_UNWRAPPED = 100_000  # columns

_TITLE = re.compile(r"╭─ (.*?) ─*╮")
_ROW = re.compile(r"│ (.*?) *│")
_RULE = re.compile(r"─+")

_HELP_INDENT = 8


def parse(
    form: type[Form],
    prog: str,
    arguments: Sequence[str] | None = None,
    *,
    default: Form | None = None,
    description: str | None = None,
    markers: Sequence[Any] = (),
) -> Form:
    """The dataclass that a command line asks for.

    Args:
        form: The dataclass. Each field is an option, and the text below it its help.
        prog: How the command is called, as in "python -m mpipar.train".
        arguments: The command line; that of this process if not given.
        default: What is taken of options that are not there, instead of the fields' defaults.
        description: What --help begins with, instead of the dataclass's own text.
        markers: Of tyro.conf, for all options.

    Raises:
        ConfigError: An option does not exist, or is missing, or cannot be.
        SystemExit: --help was asked for, and printed.
    """
    found: Form = _parse(form, prog, arguments, default=default, description=description, markers=markers)
    return found


def parse_one_of(
    forms: Mapping[str, type[Form]],
    prog: str,
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
) -> Form:
    """The dataclass that a command line with a subcommand asks for: the one of that name. As `parse` otherwise."""
    choices = [Annotated[form, tyro.conf.subcommand(name)] for name, form in forms.items()]
    found: Form = _parse(reduce(or_, choices), prog, arguments, description=description)
    return found


def _parse(
    form: Any,
    prog: str,
    arguments: Sequence[str] | None,
    *,
    default: Any = None,
    description: str | None = None,
    markers: Sequence[Any] = (),
) -> Any:
    registry = ConstructorRegistry()
    registry.struct_rule(_fields_with_help)
    read = partial(
        tyro.cli,
        form,
        prog=prog,
        args=sys.argv[1:] if arguments is None else arguments,
        default=MISSING_NONPROP if default is None else default,
        description=description,
        config=markers,
        registry=registry,
    )
    attempt = _Attempt.of(read, _Kept(sys.stdout.encoding, terminal=sys.stdout.isatty()))
    if attempt.exit is None:
        print(attempt.err, end="", file=sys.stderr)
        return attempt.result
    if not attempt.exit.code:
        print(_wrapped(attempt.out), end="")
        raise SystemExit(0)
    error = _ours(attempt.exit)
    if error is None:
        with _width(_UNWRAPPED):
            error = ConfigError(_unframed(_Attempt.of(read, _Kept("utf-8", terminal=False)).err))
    raise error from None


@dataclass(frozen=True)
class _Attempt:
    """What came of calling tyro: a result, or else its exit; and what it printed."""

    result: Any
    exit: SystemExit | None
    out: str
    err: str

    @classmethod
    def of(cls, read: Callable[[], Any], out: _Kept) -> _Attempt:
        result, leaving, err = None, None, io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                result = read()
            except SystemExit as error:
                leaving = error
        return cls(result, leaving, out.getvalue(), err.getvalue())


class _Kept(io.StringIO):
    """Output that is kept for a while. tyro asks it which frames and colours are possible, for what is an error too."""

    def __init__(self, encoding: str, *, terminal: bool):
        super().__init__()
        self._encoding = encoding
        self._terminal = terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self._terminal


@contextmanager
def _width(columns: int) -> Iterator[None]:
    """Has text wrapped to so many columns: tyro asks `shutil.get_terminal_size`, and that the environment first."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _ours(leaving: SystemExit) -> MpiparError | None:
    """The error of a dataclass's own check, if tyro left because of one."""
    error: BaseException | None = leaving
    while error is not None and not isinstance(error, MpiparError):
        error = error.__context__
    return error


def _unframed(printed: str) -> str:
    """The message in a frame as one line, without the help of the options that it names."""
    lines = printed.splitlines()
    title = next((found[1] for line in lines if (found := _TITLE.fullmatch(line))), "")
    parts, items = [""], 0
    wanted = math.inf  # items of this part
    for row in [found[1] for line in lines if (found := _ROW.fullmatch(line))] or lines:
        indent = len(row) - len(row.lstrip())
        if _RULE.fullmatch(row):
            parts.append("")
            items, wanted = 0, math.inf
        elif row == "Argument helptext:":
            parts[-1], wanted = "Expected", 1
        elif row == "Got errors:":  # one for each type of several that was tried
            wanted = -1
        elif row and indent < _HELP_INDENT and items < wanted:
            parts[-1] += ("" if not parts[-1] else ", " if items and indent else " ") + row.strip()
            items += indent > 0
    message = " ".join(part if part.endswith(".") else f"{part}." for part in parts if part)
    if not message.lower().startswith(title.lower()):
        message = f"{title}: {message}"
    return (message[:1].lower() + message[1:]).removesuffix(".")


def _wrapped(text: str) -> str:
    """Help, with its long paragraphs wrapped to the width of the terminal; what is in frames is so already."""
    columns = shutil.get_terminal_size().columns
    if not text.startswith("usage:"):
        return text
    return "".join(
        textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False) + "\n"
        if len(line) > columns and line[0].isalpha()
        else f"{line}\n"
        for line in text.splitlines()
    )


def _fields_with_help(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass for tyro. Its own rule keeps line breaks of the text below a field, and then wraps once more."""
    if not is_dataclass(info.type) or hasattr(info.type, "__parameters__"):  # tyro wraps a choice in a generic one
        return None
    kind: Any = info.type
    hints = get_type_hints(kind, include_extras=True)
    texts = cache(partial(_texts_below_fields, info.type))  # reading the source takes time, and only --help needs it

    def default(field: Any) -> Any:
        if isinstance(info.default, kind):
            return getattr(info.default, field.name)
        if field.default is not MISSING:
            return field.default
        return MISSING_NONPROP if field.default_factory is MISSING else field.default_factory()

    def text(name: str) -> str | None:
        return texts().get(name)

    specs = [
        StructFieldSpec(field.name, hints[field.name], default(field), helptext=partial(text, field.name))
        for field in fields(kind)
        if field.init
    ]
    return StructConstructorSpec(instantiate=kind, fields=tuple(specs))


def _texts_below_fields(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass and of its bases, as one paragraph."""
    texts = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts
