"""A pack that is killed at any instant goes on where it was, to the same bytes; two into one folder do not mix."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from mpipar.storage import FileLock
from tests.jobs.launch import Job, run

RANKS = 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 12 MB: some seconds of work, in shards that are done one after the other."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    with (folder / "in.jsonl").open("w") as file:
        for number in range(16_000):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=110))}) + "\n")
            if number % 100 == 0:
                file.write("bad line\n")
    return folder / "in.jsonl"


def command(text: Path, out: Path) -> list[str]:
    return ["-m", "mpipar.data", "pack", str(text), "--out", str(out), "--vocab-size", "400"]


@pytest.fixture(scope="module")
def undisturbed(text: Path) -> tuple[dict[str, bytes], float]:
    """What is packed, and how long that takes."""
    out = text.parent / "undisturbed"
    begin = time.monotonic()
    run(RANKS, *command(text, out)).ok()
    return content(out), time.monotonic() - begin


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """The shards that are there, as they were written."""
    found = {}
    for path in folder.glob("[!.]*.h5"):  # and not those that are being written
        status = path.stat()
        found[path.name] = (status.st_ino, status.st_mtime_ns)
    return found


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("seed", "whole_job"), [(0, False), (1, True), (2, False), (3, True)])
def test_kill(
    text: Path, undisturbed: tuple[dict[str, bytes], float], tmp_path: Path, seed: int, whole_job: bool
) -> None:
    expected, seconds = undisturbed
    draw = random.Random(seed)
    out = tmp_path / "out"
    job = Job(RANKS, *command(text, out))
    if seed < 2:  # certainly among shards
        wait_for_shard(job, tmp_path)
        time.sleep(draw.uniform(0, 0.02) * seconds)
    else:
        time.sleep(draw.uniform(0.3, 1.0) * seconds)
    if whole_job:
        job.kill()
    else:
        ranks = job.processes()
        if ranks:
            os.kill(draw.choice(list(ranks.values())), signal.SIGKILL)
        job.finish()
    before = {name: state for folder in tmp_path.glob(".partial-*-out") for name, state in finished(folder).items()}
    assert before or seed >= 2, [job.text, *tmp_path.rglob("*")]
    said = run(RANKS, *command(text, out)).ok()
    assert content(out) == expected
    after = finished(out)
    assert {name: after[name] for name in before} == before, "finished shards are not written again"
    if before:
        assert f"went on from {len(before)} finished shards" in said.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_packs_into_one_folder(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lock = FileLock.take(tmp_path / ".lock-out")  # as a pack that is under way has it
    assert isinstance(lock, FileLock)
    said = run(0, *command(text, out))
    said.refused(f"--out {out} is being made by process {os.getpid()} on ", "wait for its end")
    lock.release()
    assert list(tmp_path.iterdir()) == []


def wait_for_shard(job: Job, folder: Path) -> None:
    deadline = time.monotonic() + 40
    while not any(folder.glob(".partial-*-out/train-*.h5")):
        assert job.process.poll() is None, job.text
        assert time.monotonic() < deadline
        time.sleep(0.001)
