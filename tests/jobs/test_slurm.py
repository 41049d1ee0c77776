"""jobs/train.slurm under a real Slurm of two nodes, which this file starts on this host and ends again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.jobs.launch import ROOT
from tests.jobs.results import metrics

HERE = Path(__file__).parent
TIME_LIMIT_S = 150.0


def why_not() -> str:
    """Why there can be no Slurm here; empty if there can."""
    missing = [program for program in ("slurmctld", "slurmd", "sbatch", "scontrol") if shutil.which(program) is None]
    if missing:
        return f"there is no {missing[0]}: apt-get install slurm-wlm slurm-wlm-basic-plugins"
    return "" if os.geteuid() == 0 else "a Slurm of one's own has to be started by root"


pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "Slurm is here"),
    pytest.mark.timeout(2 * TIME_LIMIT_S),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([HERE / "slurm_up.sh", folder, "2", "2"], check=True, timeout=30)
        yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([HERE / "slurm_down.sh", folder], check=True, timeout=30)


class BatchJob:
    """jobs/train.slurm, submitted.

    Args:
        slurm: The environment of the cluster.
        options: Those of sbatch.
        run: The run folder.
        data: The data set.
        flags: Those of the trainer.
    """

    def __init__(self, slurm: dict[str, str], options: list[str], run: Path, data: Path, flags: list[str]):
        environ = {**slurm, "DATA": str(data), "RUN": str(run), "VENV": sys.prefix}
        self.slurm = slurm
        self.log = run.parent / "job.log"
        submit = ["sbatch", "--parsable", f"--output={self.log}", "--time=10", *options, "jobs/train.slurm", *flags]
        self.number = subprocess.run(
            submit, cwd=ROOT, env=environ, check=True, capture_output=True, text=True
        ).stdout.strip()

    def wait_for(self, sign: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + TIME_LIMIT_S
        while not sign():
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.text}"
            time.sleep(0.2)

    def finish(self) -> str:
        """Waits for the end, over all starts; the state in which the job ended."""
        self.wait_for(lambda: not self._say("squeue", "-h", "-j", self.number), "the end of the job")
        state = re.search(r"JobState=(\w+)", self._say("scontrol", "show", "job", self.number))
        assert state is not None
        return state[1]

    def ask_to_stop(self) -> None:
        """What `#SBATCH --signal` does before the time limit. Slurm itself may be half a minute late with it."""
        self._say("scancel", "--batch", "--signal=USR1", self.number)

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def _say(self, *command: str) -> str:
        return subprocess.run(command, env=self.slurm, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def submit(
    slurm: dict[str, str], train: Callable[..., list[str]], data: Path, tmp_path: Path
) -> Callable[..., BatchJob]:
    """submit(["--nodes=1"], "--train.steps", 5): a small run."""

    def submit(options: list[str], *flags: object) -> BatchJob:
        arguments = train(*flags)
        small = arguments[arguments.index("--run.dir") + 2 :]  # the script names the folders itself
        return BatchJob(slurm, options, tmp_path / "run", data, small)

    return submit


def steps(run: Path) -> list[int]:
    """The steps in the metrics of a run, in the order in which they stand there."""
    lines = metrics(run) if (run / "metrics.jsonl").exists() else []
    return [line["step"] for line in lines if "loss" in line]


def test_a_run_over_two_nodes(submit: Callable[..., BatchJob], tmp_path: Path) -> None:
    job = submit(["--nodes=2", "--ntasks-per-node=1"], "--train.steps", 5)
    assert job.finish() == "COMPLETED", job.text
    assert "2 ranks on n[1-2]" in job.text
    assert job.text.splitlines()[-1].startswith("done: 5 steps"), job.text
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_run_that_takes_two_starts(submit: Callable[..., BatchJob], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(["--nodes=1", "--ntasks-per-node=2"], "--train.steps", 300, "--train.eval-every", 5)
    job.wait_for(lambda: len(steps(run)) > 10, "step 10")
    job.ask_to_stop()
    assert job.finish() == "COMPLETED", job.text
    assert "asked to stop" in job.text and "back into the queue" in job.text
    assert f"job {job.number}, start 2: " in job.text
    assert "goes on from step " in job.text
    assert job.text.splitlines()[-1].startswith("done: 300 steps"), job.text
    assert steps(run) == list(range(1, 301)), "no step is missing, and none was done twice"


def test_a_run_that_fails_is_not_repeated(submit: Callable[..., BatchJob]) -> None:
    job = submit(["--nodes=1", "--ntasks-per-node=2"], "--train.steps", 5, "--model.dim", 33)
    assert job.finish() == "FAILED", job.text
    assert "--model.dim 33" in job.text and "failed with exit code" in job.text
    assert "start 2" not in job.text


def test_starts_are_limited(submit: Callable[..., BatchJob], tmp_path: Path) -> None:
    job = submit(["--nodes=1", "--ntasks-per-node=2", "--export=ALL,MAX_STARTS=1"], "--train.steps", 1000)
    job.wait_for(lambda: steps(tmp_path / "run"), "step 1")
    job.ask_to_stop()
    assert job.finish() == "FAILED", job.text
    assert "not done after 1 starts" in job.text
