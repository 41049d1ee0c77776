"""Losses of several runs over each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.curves import Curves, read, verdict
from mpipar.errors import ConfigError


def keep(folder: Path, losses: dict[int, float], ranks: dict[int, int] | None = None) -> Path:
    folder.mkdir()
    lines = [{"step": step, "loss": loss, **({"ranks": ranks[step]} if ranks else {})} for step, loss in losses.items()]
    evaluation = {"step": 2, "val_loss": 3.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, evaluation]))
    return folder


def test_what_is_seen_of_two_runs(tmp_path: Path) -> None:
    first = read(keep(tmp_path / "a", {1: 4.0, 2: 3.5, 3: 3.0}), "first")
    same = read(keep(tmp_path / "b", {1: 4.0, 2: 3.5}, {1: 8, 2: 7}), "same")
    other = read(keep(tmp_path / "c", {1: 4.0, 2: 3.25, 3: 3.125}), "other")
    assert verdict(same, first) == "the loss of first at all 2 steps"
    assert verdict(other, first) == "differs at 2 of 3 steps, by up to 0.25"
    assert first.changes == [] and same.changes == [(2, 8, 7)]


@pytest.mark.parametrize("last", [3.5, 3.25])
def test_a_picture_is_drawn(tmp_path: Path, last: float) -> None:
    pytest.importorskip("matplotlib")
    runs = (keep(tmp_path / "a", {1: 4.0, 2: 3.5}), keep(tmp_path / "b", {1: 4.0, 2: last}, {1: 8, 2: 7}))
    Curves(runs=runs, out=tmp_path / "curves.png").run()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.png"
    with pytest.raises(ConfigError, match="no runs"):
        Curves(runs=(), out=picture).run()
    with pytest.raises(ConfigError, match="holds no metrics"):
        Curves(runs=(tmp_path,), out=picture).run()
    with pytest.raises(ConfigError, match="2 labels for 1 runs"):
        Curves(runs=(tmp_path,), labels=("a", "b"), out=picture).run()
    with pytest.raises(ConfigError, match="--out"):
        Curves(runs=(tmp_path,), out=tmp_path / "curves.jpg").run()
