"""Which of several programs of one name is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpipar.programs import find_program


def make(folder: Path, name: str, mode: int = 0o755) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return str(path)


def test_the_one_beside_comes_before_those_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = make(tmp_path / "env", "python")
    ours, other = make(tmp_path / "env", "launch"), make(tmp_path / "other", "launch")
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    assert find_program("launch", beside=python) == ours
    assert find_program("launch", beside=str(tmp_path / "empty" / "python")) == other
    make(tmp_path / "env", "launch", mode=0o644)
    assert find_program("launch", beside=python) == other, "what cannot be run is no program"


@pytest.mark.parametrize("path", ["", None])
def test_what_is_nowhere(path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a PATH too: the current folder is not searched."""
    make(tmp_path, "no-such-launch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PATH") if path is None else monkeypatch.setenv("PATH", path)
    assert find_program("no-such-launch") is None
