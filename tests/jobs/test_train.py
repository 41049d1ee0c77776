"""A run from its beginning to its end: what it leaves, that it can be repeated, stopped and killed."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from mpipar.checkpoint import latest
from mpipar.comm.environment import mpi_facts
from tests.jobs.launch import ROOT, TIME_LIMIT_S, Job, mpirun, run
from tests.jobs.results import assert_same_run, exact, metrics, weights

pytestmark = pytest.mark.timeout(240)

Arguments = Callable[..., list[str]]


def test_what_a_run_leaves(train: Arguments, tmp_path: Path) -> None:
    outcome = run(2, *train("--train.steps", 6, "--train.eval-every", 3, "--checkpoint.every", 2)).ok()
    folder = tmp_path / "run"
    lines = metrics(folder)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    for line in steps:
        assert line["tokens"] == line["step"] * 4 * 32
        assert math.isclose(line["tokens_per_s"], 4 * 32 / line["step_s"])
        assert 0 < line["compute_s"] + line["comm_s"] + line["data_s"] <= line["step_s"]
        assert line["bytes_sent"] == 0, "on one host all is added up in shared memory"
        assert line["peak_memory_bytes"] >= 0 and line["grad_norm"] > 0
    assert steps[-1]["peak_memory_bytes"] > 50e6, "two ranks that imported torch"
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert 'precision = "auto"' not in (folder / "config.toml").read_text(), "the settings are kept resolved"
    val_loss = lines[-1]["val_loss"]
    assert outcome.lines[-1] == f"done: 6 steps, val_loss {val_loss:.4f}, {folder}"
    assert "unigram entropy" in outcome.text and "\x1b" not in outcome.text and "\r" not in outcome.text

    again = run(2, *train("--train.steps", 6, "--train.eval-every", 3, "--checkpoint.every", 2)).ok()
    assert again.lines[-1] == outcome.lines[-1], "a finished run says so again, and changes nothing"
    assert metrics(folder) == lines


def test_the_kept_settings_repeat_the_run_and_a_single_process_needs_no_mpirun(
    train: Arguments, tmp_path: Path
) -> None:
    run(0, *train("--train.steps", 3)).ok()
    kept = tmp_path / "run" / "config.toml"
    run(0, "-m", "mpipar.train", "--config", str(kept), "--run.dir", str(tmp_path / "again")).ok()
    assert_same_run(tmp_path / "run", tmp_path / "again")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_two_runs_with_one_seed_are_one(train: Arguments, tmp_path: Path, num_ranks: int) -> None:
    """Also with ranks that have different numbers of microbatches: 4 over 3."""
    for folder in ("a", "b"):
        run(num_ranks, *train("--train.steps", 5, "--train.eval-every", 2, folder=folder)).ok()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_rank_counts_agree_up_to_rounding(train: Arguments, tmp_path: Path) -> None:
    for num_ranks in (0, 4):
        run(num_ranks, *train("--train.steps", 5, "--train.precision", "fp32", folder=str(num_ranks))).ok()
    one, four = exact(tmp_path / "0"), exact(tmp_path / "4")
    for a, b in zip(one, four, strict=True):
        key = "loss" if "loss" in a else "val_loss"
        assert math.isclose(a[key], b[key], rel_tol=1e-4)


@pytest.mark.parametrize("how", ["USR1 to mpirun", "TERM to a rank"])
def test_asked_to_stop_it_saves_and_goes_on_later(train: Arguments, tmp_path: Path, how: str) -> None:
    settings = ("--train.steps", 80, "--train.eval-every", 2, "--checkpoint.every", 1000)
    job = Job(2, *train(*settings))
    job.wait_for("step      3/80")
    if how == "USR1 to mpirun":
        os.kill(job.process.pid, signal.SIGUSR1)
    else:
        os.kill(job.ranks()[1], signal.SIGTERM)
    stopped = job.finish().ok()
    assert any(line.startswith("stopped: ") for line in stopped.lines), stopped.text
    if how == "USR1 to mpirun":  # which is for rank 0 too
        assert len(re.findall("^stop    SIGUSR1 in step .* from the beginning", stopped.text, re.MULTILINE)) == 1
    assert not any(line.startswith("done: ") for line in stopped.lines)
    reached = metrics(tmp_path / "run")[-1]["step"]
    assert 3 <= reached < 80
    assert (tmp_path / "run" / "checkpoints" / f"step-{reached:08d}").is_dir()
    resumed = run(2, *train(*settings)).ok()
    assert f"goes on from step {reached}" in resumed.text and resumed.lines[-1].startswith("done: 80 steps")
    run(2, *train(*settings, folder="undisturbed")).ok()
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_ctrl_c_at_a_terminal_leaves_a_word(train: Arguments, tmp_path: Path) -> None:
    """mpirun passes nothing on from then, so the rank says it to the terminal itself, in the time that it is left."""
    if "Open MPI" not in mpi_facts().library:
        pytest.skip("how the mpirun of Open MPI ends a job")
    terminal, screen = os.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # EIO: nobody has the screen any more
            while text := os.read(terminal, 4096):
                shown.append(text)

    command = [mpirun(), "-n", "2", sys.executable, *train("--train.steps", 100_000, "--checkpoint.every", 2)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=screen, stderr=screen, start_new_session=True
    ) as job:
        os.close(screen)
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        deadline = time.monotonic() + TIME_LIMIT_S
        while not (tmp_path / "run/checkpoints/step-00000002").is_dir():
            assert job.poll() is None and time.monotonic() < deadline, b"".join(shown).decode()
            time.sleep(0.01)
        job.send_signal(signal.SIGINT)
        assert job.wait(TIME_LIMIT_S) != 0
    reader.join()
    os.close(terminal)
    text = b"".join(shown).decode()
    said = re.search(r"stop    SIGTERM in step (\d+): .* goes on from step-(\d{8})", text)
    assert said and 2 <= int(said[2]) < int(said[1]), text
    latest_there = latest(tmp_path / "run/checkpoints")
    assert latest_there is not None and latest_there.name >= f"step-{said[2]}"


@pytest.mark.parametrize("moment_s", [0.7, 1.5])
def test_asked_to_stop_while_it_starts(train: Arguments, tmp_path: Path, moment_s: float) -> None:
    """The request is kept until there is something to save: the first step."""
    job = Job(2, *train("--train.steps", 1000))
    time.sleep(moment_s)
    os.kill(job.process.pid, signal.SIGUSR1)
    job.finish().ok()
    assert metrics(tmp_path / "run")[-1]["step"] == 1
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()


@pytest.mark.timeout(400)
def test_twenty_kills_change_nothing(train: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL of launcher and ranks at random moments: at start-up, in a step, while a checkpoint is written."""
    settings = ("--train.steps", 120, "--train.eval-every", 10, "--checkpoint.every", 2)
    # A killed mpirun leaves files there, over which a later one of the same process number stumbles.
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    run(2, *train(*settings, folder="undisturbed")).ok()
    rng = random.Random(7)
    for kill in range(20):
        job = Job(2, *train(*settings))
        if kill % 4:
            job.wait_for("run     ")  # the steps begin
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(0, 4))
        job.kill()
        assert not [line for line in job.output if line.startswith("mpipar:")], job.text
    run(2, *train(*settings)).ok()
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    assert not list((tmp_path / "run").rglob(".partial-*")), "what the kills left is cleared"


def test_going_on_from_an_earlier_checkpoint_rewinds(train: Arguments, tmp_path: Path) -> None:
    settings = ("--train.steps", 6, "--checkpoint.every", 2, "--checkpoint.keep", 5)
    run(1, *train(*settings, folder="undisturbed")).ok()
    run(1, *train(*settings)).ok()
    earlier = tmp_path / "run" / "checkpoints" / "step-00000002"
    resumed = run(1, *train(*settings, "--resume", earlier)).ok()
    assert "goes on from step 2" in resumed.text
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_going_on_from_another_run_needs_a_folder_of_its_own(train: Arguments, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        run(0, *train("--train.steps", 2, folder=folder)).ok()
    before = metrics(tmp_path / "b")
    run(0, *train("--train.steps", 4, "--resume", tmp_path / "a", folder="b")).refused("give a new --run.dir")
    assert metrics(tmp_path / "b") == before
    run(0, *train("--train.steps", 4, "--resume", tmp_path / "a", folder="c")).ok()
    run(0, *train("--train.steps", 4, folder="a")).ok()
    assert weights(tmp_path / "c").keys() == weights(tmp_path / "a").keys()
    assert all(torch.equal(t, weights(tmp_path / "a")[name]) for name, t in weights(tmp_path / "c").items())


def test_a_folder_that_a_running_job_has_is_refused(train: Arguments, tmp_path: Path) -> None:
    job = Job(1, *train("--train.steps", 100_000, "--checkpoint.every", 100_000))
    job.wait_for("step      1/")
    for resume in ("auto", "never"):
        run(0, *train("--train.steps", 5, "--resume", resume)).refused("is in use by process", "another --run.dir")
    job.kill()
    run(0, *train("--train.steps", 100_001, "--train.lr", "1e-3", "--resume", "never", "--train.steps", 2)).ok()


def test_never_keeps_the_earlier_run(train: Arguments, tmp_path: Path) -> None:
    run(1, *train("--train.steps", 2)).ok()
    outcome = run(1, *train("--train.steps", 3, "--resume", "never")).ok()
    assert f"the earlier run is now {tmp_path}/run.old-1" in outcome.text
    assert len(metrics(tmp_path / "run.old-1")) == 3 and len(metrics(tmp_path / "run")) == 4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activation_checkpointing_changes_nothing(train: Arguments, tmp_path: Path, family: str) -> None:
    for setting in ("true", "false"):
        more = ("--train.activation-checkpointing", setting, "--model.family", family, "--train.precision", "fp32")
        run(2, *train("--train.steps", 3, *more, folder=setting)).ok()
    assert_same_run(tmp_path / "true", tmp_path / "false")
