"""The walls of the house: imports go strictly down, and packages on one floor do not import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. A new package has to be given its floor here.
FLOORS = [
    {"errors", "supervised", "programs", "processor", "amounts", "compiled"},
    {"comm", "storage", "command_line"},
    {"model", "data", "checkpoint"},
    {"parallel"},
    {"train"},
    {"doctor", "launch"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

# Third-party packages that only some of ours may import: everything else goes through those.
RESERVED = {
    "mpi4py": {"comm"},
    "cupy": {"comm"},
    "h5py": {"storage", "doctor"},
    "tokenizers": {"data"},
    "pyarrow": {"data"},
}

# What a package may import of ours, where that is less than the floors below it.
ONLY = {"model": {"errors"}, "storage": {"errors"}, "command_line": {"errors"}}

MODULES = sorted((ROOT / "mpipar").rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The full names of imported modules, with their lines, wherever in the file they are imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            yield node.module, node.lineno
            if node.module == "mpipar":
                yield from ((f"mpipar.{alias.name}", node.lineno) for alias in node.names)


def owner(path: Path) -> str:
    """The package or module directly under mpipar to which a file belongs."""
    return path.relative_to(ROOT / "mpipar").parts[0].removesuffix(".py")


def broken_walls(home: str, tree: ast.AST) -> Iterator[str]:
    """What a file of `home` imports and may not."""
    for name, line in imports(tree):
        top, _, rest = name.partition(".")
        if top == "mpipar" and rest:
            other = rest.partition(".")[0]
            if other == home or (other not in FLOOR and other.startswith("__")):
                continue
            if other not in FLOOR:
                yield f"line {line}: {name} is on no floor"
            elif FLOOR[other] >= FLOOR[home]:
                yield f"line {line}: {home} is on floor {FLOOR[home]}, {other} on floor {FLOOR[other]}"
            elif home in ONLY and other not in ONLY[home]:
                yield f"line {line}: {home} may import {', '.join(ONLY[home])} only, not {other}"
        elif home not in RESERVED.get(top, {home}):
            yield f"line {line}: only {', '.join(sorted(RESERVED[top]))} may import {top}, not {home}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    if path == ROOT / "mpipar/__init__.py":
        assert not list(imports(ast.parse(path.read_text()))), "import mpipar is free of side effects"
        return
    home = owner(path)
    assert home in FLOOR, f"give mpipar/{home} a floor"
    assert not list(broken_walls(home, ast.parse(path.read_text())))


@pytest.mark.parametrize(
    ("home", "line"),
    [
        ("comm", "from mpipar.storage import ArrayFile"),
        ("data", "from mpipar import model"),
        ("parallel", "def f():\n    import mpipar.train.loop"),
        ("train", "from mpi4py import MPI"),
        ("data", "import cupy as cp"),
        ("model", "from mpipar.comm import Mesh"),
        ("train", "import mpipar.attic"),
    ],
)
def test_a_broken_wall_is_seen(home: str, line: str) -> None:
    assert len(list(broken_walls(home, ast.parse(line)))) == 1


def test_walls_let_through_what_is_allowed() -> None:
    allowed = (
        "import mpipar\nfrom mpipar import __version__\nfrom mpipar.comm import Mesh\nfrom mpipar.train.loop import x"
    )
    assert not list(broken_walls("train", ast.parse(allowed)))


def test_no_file_imports_mpi_but_one() -> None:
    """mpi4py.rc has to be set before the first import: there is one place for both."""
    found = [
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        if any(name.split(".")[0] == "mpi4py" for name, _ in imports(ast.parse(path.read_text())))
    ]
    assert found == ["mpipar/comm/mpi.py"]
