"""Atomic files and folders: whole or not there, flushed in the right order, nothing left behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mpipar.storage import atomic_file, atomic_folder, remove_partials
from tests.single.crash_points import crash_everywhere, run_as_program


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path):
    with atomic_file(tmp_path / "a") as partial:
        partial.write_text("new")
        assert not (tmp_path / "a").exists()
        assert partial.name.startswith(".partial-")
    assert (tmp_path / "a").read_text() == "new"
    assert entries(tmp_path) == ["a"]


def test_a_failed_file_leaves_the_old_one(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert entries(tmp_path) == ["a"]


@pytest.mark.parametrize("present", [False, True])
def test_a_folder_appears_when_the_block_ends(tmp_path, present):
    if present:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "old").write_text("old")
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("new")
    assert entries(tmp_path) == ["a"]
    assert entries(tmp_path / "a") == ["inner"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as partial:
        (partial / "half").write_text("half")
        raise RuntimeError
    assert entries(tmp_path) == ["a"]
    assert entries(tmp_path / "a") == ["old"]


def test_permissions_are_the_usual_ones(tmp_path):
    mask = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "a"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".partial-12121212-a").write_text("")
    (tmp_path / ".partial-34343434-b").mkdir()
    (tmp_path / ".partial-34343434-b" / "c").write_text("")
    (tmp_path / ".partial-56565656-link").symlink_to(tmp_path / "kept", target_is_directory=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / ".hidden").write_text("")
    remove_partials(tmp_path)
    assert entries(tmp_path) == [".hidden", "kept"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells which file a descriptor is")
def test_the_contents_are_flushed_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def flushed(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(call):
        def record(source, target):
            calls.append("rename")
            call(source, target)

        return record

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed(rename))
    monkeypatch.setattr(os, "replace", renamed(replace))
    with atomic_file(tmp_path / "a") as partial:
        partial.write_text("")
    assert calls == [partial.name, "rename", tmp_path.name]
    calls.clear()
    with atomic_folder(tmp_path / "b") as partial:
        (partial / "c").write_text("")
    assert calls == ["c", partial.name, "rename", tmp_path.name]


def test_a_kill_at_any_call_leaves_old_or_new(tmp_path):
    assert run_as_program("tests.single.test_storage_atomic", str(tmp_path)) > 10


def main(folder: Path) -> None:
    file, tree = folder / "file", folder / "tree"
    file.write_text("old")

    def action() -> None:
        with atomic_file(file) as partial:
            partial.write_text("new")
        with atomic_folder(tree) as partial:
            (partial / "x").write_text("new")
            (partial / "y").write_text("new")

    def check() -> None:
        assert file.read_text() in ("old", "new")
        assert not tree.exists() or entries(tree) == ["x", "y"]
        remove_partials(folder)
        assert entries(folder) in (["file"], ["file", "tree"])

    print(crash_everywhere(action, check))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
