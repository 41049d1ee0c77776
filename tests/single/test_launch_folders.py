"""A supervisor's folders: whose they are, and what the next one may remove."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpipar.errors import ConfigError
from mpipar.launch.folders import Folders, removal_script, remove_dead
from mpipar.launch.processes import SHARED_MEMORY

OWNER = """
import pathlib, sys, tempfile
from mpipar.launch.folders import Folders
tempfile.tempdir = sys.argv[1]
print(Folders(pathlib.Path(sys.argv[2])).reports.name, flush=True)
sys.stdin.read()
"""

Start = Callable[[], tuple[subprocess.Popen[str], list[Path]]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start(): another process that has folders, and those."""
    for name in ("temporary", "below"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    started = []

    def start() -> tuple[subprocess.Popen[str], list[Path]]:
        command = [sys.executable, "-c", OWNER, str(tmp_path / "temporary"), str(tmp_path / "below")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        folders = [place / name for place in (tmp_path / "below", tmp_path / "temporary", SHARED_MEMORY)]
        started.append((process, folders))
        return process, folders

    yield start
    for process, folders in started:
        process.kill()
        process.communicate()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def fill(folders: list[Path]) -> None:
    for folder in folders:
        (folder / "start-1" / "deep").mkdir(parents=True)
        (folder / "start-1" / "deep" / "file").write_text("left")
        (folder / "file").write_text("left")
        (folder / "link").symlink_to("/")


def test_those_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path: Path, start: Start) -> None:
    dead, left = start()
    _, kept = start()
    fill(left)
    assert left[0].name not in remove_dead(tmp_path / "below") and all(folder.is_dir() for folder in [*left, *kept])
    dead.kill()
    dead.wait()
    assert left[0].name in remove_dead(tmp_path / "below")
    assert not any(folder.exists() for folder in left) and all(folder.is_dir() for folder in kept)
    assert left[0].name not in remove_dead(tmp_path / "below")


def test_one_that_is_killed_while_it_removes_is_not_the_last(tmp_path: Path, start: Start) -> None:
    dead, left = start()
    dead.kill()
    dead.wait()
    shutil.rmtree(left[0])
    assert left[0].name in remove_dead(tmp_path / "below")
    assert not any(folder.exists() for folder in left)


@pytest.mark.parametrize("why", ["another host's", "no mark", "not locked yet", "another name"])
def test_of_what_nothing_is_known_that_stays(tmp_path: Path, start: Start, why: str) -> None:
    folder = tmp_path / "below" / ("something-else" if why == "another name" else "mpipar-launch-abc")
    folder.mkdir()
    if why != "no mark":
        host = "elsewhere" if why == "another host's" else socket.gethostname()
        (folder / (".owner-new" if why == "not locked yet" else ".owner")).write_text(host)
    assert folder.name not in remove_dead(tmp_path / "below") and folder.is_dir()


def test_its_own_are_removed_at_its_end(tmp_path: Path, start: Start) -> None:
    for below in (None, tmp_path / "below"):
        folders = Folders(below)
        made = [folders.reports, folders.files, folders.shared_memory]
        assert all(folder.is_dir() for folder in made) and len(set(made)) == (2 if below is None else 3)
        fill(list(set(made)))
        folders.remove()
        assert not any(folder.exists() for folder in made)
    assert removal_script(["x"]) == f"rm -rf {tmp_path}/temporary/x /dev/shm/x"


def test_no_place_for_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--scratch"):
        Folders(tmp_path / "nowhere")
