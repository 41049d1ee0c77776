"""Command lines: a mistake is one line that says what was expected, and help is wrapped once."""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from mpipar.command_line import parse, parse_one_of
from mpipar.errors import ConfigError

ROOT = Path(__file__).parents[2]
PROG = "python -m oven"


@dataclass(frozen=True, kw_only=True)
class Heat:
    """How warm."""

    degrees: int = 180
    """In the middle of the oven, where the loaf is, measured with
    64 sensors
    (docs/heat.md)."""
    how: Literal["below", "above"] = "below"
    """Where it comes from."""

    def __post_init__(self) -> None:
        if self.degrees > 300:
            raise ConfigError(f"--heat.degrees {self.degrees} burns: take at most 300")


@dataclass(frozen=True, kw_only=True)
class Bake:
    """Bakes a loaf.

    It rises, and rests, and is then baked for as long as it takes; this paragraph is written in lines of a hundred and
    twenty columns, and a terminal has eighty.
    """

    heat: Heat = field(default_factory=Heat)
    minutes: float | None = None
    """As long as it takes if not given."""
    grains: tuple[int, ...] = ()
    name: str = "loaf"

    def __post_init__(self) -> None:
        if self.minutes is not None and self.minutes < self.heat.degrees / 100:
            raise ConfigError(f"--minutes {self.minutes} are too few at {self.heat.degrees} degrees")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Cuts a loaf."""

    loaf: tyro.conf.Positional[Path]
    """The loaf."""
    pieces: Annotated[int, tyro.conf.arg(aliases=["-n"])]
    """How many."""


@pytest.fixture(autouse=True, params=[("80", "utf-8"), ("60", "ascii")], ids=["terminal", "narrow log"])
def output(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the output goes makes no difference to a message."""
    columns, encoding = request.param
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(type(sys.stdout), "encoding", encoding, raising=False)


def bake(*arguments: str) -> Bake:
    return parse(Bake, PROG, arguments)


def test_what_is_asked_for() -> None:
    assert bake() == Bake()
    asked = bake("--heat.degrees", "200", "--heat.how=above", "--minutes", "40", "--grains", "1", "2")
    assert asked == Bake(heat=Heat(degrees=200, how="above"), minutes=40.0, grains=(1, 2))
    default = Bake(heat=Heat(degrees=90), name="rusk")
    assert parse(Bake, PROG, ["--heat.how", "above"], default=default) == Bake(
        heat=Heat(degrees=90, how="above"), name="rusk"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--heat.degree 3", "unrecognized options: --heat.degree, 3. Perhaps you meant: --heat.degrees INT"),
        ("stray", "unrecognized options: stray"),
        ("--heat.degrees warm", "'warm'. Expected --heat.degrees INT"),
        ("--minutes soon", "['soon']. Expected --minutes {None}|FLOAT"),
        ("--grains 1 rye", "['1', 'rye']. Expected --grains [INT [INT ...]]"),
        ("--heat.how within", "invalid choice 'within' for argument '--heat.how'. Expected one of ('below', 'above')"),
        ("--heat.degrees", "--heat.degrees"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        bake(*arguments.split())
    said = str(raised.value)
    assert message in said and f"{PROG} --help" in said
    assert said.isprintable() and not set(said) & set("│╭─╮╰╯") and "  " not in said
    assert capsys.readouterr() == ("", "")
    assert raised.value.__suppress_context__, "a traceback would show tyro's"


def test_what_was_given_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long word is not broken at the width of the terminal, nor at its commas."""
    given = "/a/long/path," * 20
    with pytest.raises(ConfigError) as raised:
        bake(given)
    assert given in str(raised.value)
    monkeypatch.delenv("COLUMNS")
    with pytest.raises(ConfigError):
        bake(given)
    assert "COLUMNS" not in os.environ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--heat.degrees 400", "--heat.degrees 400 burns: take at most 300"),
        ("--minutes 1", "--minutes 1.0 are too few at 180 degrees"),
    ],
)
def test_what_a_dataclass_refuses_is_said_in_its_own_words(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        bake(*arguments.split())
    assert str(raised.value) == message and capsys.readouterr() == ("", "")
    with pytest.raises(ConfigError, match="burns"):
        parse_one_of({"bake": Bake, "slice": Slice}, PROG, ["bake", "--heat.degrees", "400"])


def test_subcommands() -> None:
    forms: dict[str, type[Bake] | type[Slice]] = {"bake": Bake, "slice": Slice}
    assert parse_one_of(forms, PROG, ["bake"]) == Bake()
    assert parse_one_of(forms, PROG, ["slice", "rusk", "-n", "3"]) == Slice(loaf=Path("rusk"), pieces=3)
    for arguments, message in (
        ("", "missing subcommand: Expected one of {bake, slice}"),
        ("slic", "unrecognized options: slic. Available subcommands: bake, slice"),
        ("slice rusk", f"Missing from {PROG} slice: -n INT, --pieces INT"),
        ("slice", f"Missing from {PROG} slice: PATH, -n INT, --pieces INT"),
    ):
        with pytest.raises(ConfigError) as raised:
            parse_one_of(forms, PROG, arguments.split())
        assert message in str(raised.value)


def test_help_is_wrapped_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bake("--help")
    assert left.value.code == 0
    out, err = capsys.readouterr()
    columns = int(os.environ["COLUMNS"])
    assert not err and max(map(len, out.splitlines())) <= columns
    words = " ".join(line.strip("│ ") for line in out.splitlines())
    assert "measured with 64 sensors (docs/heat.md). (default: 180)" in " ".join(words.split())
    assert "as long as it takes; this paragraph is written" in " ".join(words.split())
    # A line ends where the next word would not have fitted.
    rows = [row.strip("│") for row in out.splitlines() if "│" in row or row.startswith("  ")]
    help_rows = rows[next(i for i, row in enumerate(rows) if "In the middle" in row) :]
    for row, following in pairwise(help_rows):
        if "(default" in row:
            break
        assert len(row.rstrip()) + len(f" {following.split()[0]}") > columns - 4


def test_nobody_else_asks_tyro() -> None:
    """One place decides what becomes of a mistake."""
    asks = [
        path.relative_to(ROOT).as_posix()
        for folder in ("mpipar", "benchmarks", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ("cli", "extras") and ast.unparse(node.value) == "tyro")
        or (isinstance(node, ast.Import) and any(alias.name == "argparse" for alias in node.names))
    ]
    assert set(asks) - {"tests/single/test_data_words.py"} == {"mpipar/command_line.py"}
