"""metrics.jsonl is rewound to the checkpoint that a run goes on from, and a cut line is taken back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpipar.errors import ConfigError
from mpipar.train.metrics_file import Metrics, read_metrics
from mpipar.train.run_folder import RunFolder


def write(path: Path, steps: list[int], tail: str = "") -> None:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)


@pytest.mark.parametrize(
    ("steps", "tail", "after", "kept"),
    [
        ([1, 2, 3, 4], "", 2, [1, 2]),
        ([1, 2, 2, 3], "", 2, [1, 2, 2]),
        ([1, 2], '{"step": 3, "lo', 5, [1, 2]),
        ([1, 2], "", 0, []),
        ([1, 2], "\0" * 40 + "\n" + '{"step": 3}\n', 5, [1, 2]),
        ([], "", 3, []),
    ],
)
def test_rewinding(tmp_path: Path, steps: list[int], tail: str, after: int, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, steps, tail)
    metrics = Metrics(path, after_step=after)
    assert [m["step"] for m in read_metrics(path)] == kept
    metrics.write({"step": after + 1})
    metrics.close()
    assert [m["step"] for m in read_metrics(path)] == [*kept, after + 1]


def test_an_earlier_run_is_moved_and_not_lost(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = RunFolder(tmp_path / "run")
        folder.create()
        write(folder.metrics, [number])
        assert folder.holds_a_run()
        assert folder.move_aside() == tmp_path / f"run.old-{number}"
    assert [m["step"] for m in read_metrics(tmp_path / "run.old-1" / "metrics.jsonl")] == [1]


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "run").create()
    with pytest.raises(ConfigError, match="cannot be made"):
        RunFolder(tmp_path / "run" / "inside").create()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", after_step=0)
    metrics.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}]


def test_a_folder_has_one_job(tmp_path: Path) -> None:
    """Locks are a process's own, so the second job is another process."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.claim()
    program = "from pathlib import Path; from mpipar.train.run_folder import RunFolder; "
    program += f"RunFolder(Path({str(folder.path)!r})).claim()"
    second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert second.returncode != 0 and f"is in use by process {os.getpid()} on" in second.stderr
    folder.release()
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
