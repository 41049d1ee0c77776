"""Ranks die, and the run goes on: in the same processes, to the bits of a run in which nobody died."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpipar.checkpoint import load
from mpipar.comm.environment import mpi_facts
from tests.jobs.launch import ROOT, Job, Outcome, run
from tests.jobs.results import digest, exact

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(mpi_facts().fault_tolerance == "absent", reason="this MPI has no fault tolerance"),
]

Train = Callable[..., list[str]]
Result = tuple[str, list[dict[str, Any]]]
FAILING = str(ROOT / "tests" / "jobs" / "failing.py")
STEPS = 40
SETTINGS = ["--train.steps", STEPS, "--train.global-batch", 8, "--train.eval-every", 10, "--checkpoint.every", 10]
SETTINGS += ["--comm.timeout-s", 20]
SURVIVABLE = ["--with-ft", "ulfm"]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The digest and the metrics of the run in which nobody dies."""
    from tests.jobs.conftest import TINY

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    arguments = ["-m", "mpipar.train", "--data.dir", data, "--run.dir", folder, *TINY, *SETTINGS]
    outcome = run(2, *map(str, arguments)).ok()
    return digest(outcome), exact(folder)


def disturbed(
    arguments: Sequence[str], deaths: Sequence[tuple[int, Sequence[int]]], number: int = signal.SIGKILL, ranks: int = 4
) -> Outcome:
    """A run in which ranks get a signal when the log shows a step: [(step, ranks), ...]."""
    job = Job(ranks, *arguments, options=SURVIVABLE)
    pids: list[int] = []
    for step, victims in deaths:
        job.wait_for(f"step {step:>6}/{STEPS}  loss")
        pids = pids or job.ranks()
        for victim in victims:
            os.kill(pids[victim], number)
    return job.finish()


@pytest.mark.parametrize(
    "deaths",
    [[(12, [2])], [(12, [0])], [(9, [1]), (19, [0]), (29, [3])], [(9, [0, 2])], [(20, [3, 1, 0])]],
    ids=["a worker", "the leader", "one after the other", "two at once", "all but one"],
)
def test_the_run_goes_on(
    train: Train, tmp_path: Path, undisturbed: Result, deaths: list[tuple[int, list[int]]]
) -> None:
    outcome = disturbed(train(*SETTINGS), deaths).ok()
    assert (digest(outcome), exact(tmp_path / "run")) == undisturbed
    assert sum(line.startswith("lost ") for line in outcome.lines) >= 1
    dead = sorted(rank for _, ranks in deaths for rank in ranks)
    assert all(f"{rank}" in outcome.text for rank in dead)
    assert [path.name for path in (tmp_path / "run").rglob(".partial*")] == []


def test_a_rank_that_hangs_is_ended(train: Train, tmp_path: Path, undisturbed: Result) -> None:
    arguments = train(*SETTINGS, "--elastic.hang-s", 2)
    outcome = disturbed(arguments, [(12, [0])], signal.SIGSTOP, ranks=3).ok()
    assert (digest(outcome), exact(tmp_path / "run")) == undisturbed
    assert "lost    rank 0 died" in outcome.text


def test_where_ranks_cannot_share_memory_the_run_does_without(
    train: Train, tmp_path: Path, undisturbed: Result
) -> None:
    """Nothing is claimed, nobody is watched, gradients go round in messages; a death is survived all the same."""
    arguments = [FAILING, "apart", "1", "0", *train(*SETTINGS, "--elastic.hang-s", 2)[2:]]
    outcome = disturbed(arguments, [(12, [2])], ranks=3).ok()
    assert (digest(outcome), exact(tmp_path / "run")) == undisturbed
    reason = "a neighbour's memory cannot be opened: Permission denied"
    for told in (
        f"reduce  exactly, in memory of each rank's own: {reason}",
        f"note    ranks get equal numbers of microbatches, however fast they are: {reason}",
        f"note    a rank that hangs will not be ended: {reason}",
    ):
        assert outcome.lines.count(told) == 1, outcome.text


@pytest.mark.parametrize("victim", [0, 2], ids=["the leader", "another"])
def test_a_death_while_a_checkpoint_is_written(train: Train, tmp_path: Path, undisturbed: Result, victim: int) -> None:
    """Rank 1 is slow with its share of step 10, and another dies: what is half-written is given up, and made anew."""
    job = Job(3, FAILING, "slow", "1", "1", *train(*SETTINGS, "--checkpoint.keep", 9)[2:], options=SURVIVABLE)
    job.wait_for(f"step     11/{STEPS}")
    assert list((tmp_path / "run" / "checkpoints").glob(".partial-*"))
    os.kill(job.ranks()[victim], signal.SIGKILL)
    outcome = job.finish().ok()
    assert (digest(outcome), exact(tmp_path / "run")) == undisturbed
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(kept) == 4 and "step-00000010" not in kept, "a later one in its place"
    for name in kept:
        with load(tmp_path / "run" / "checkpoints" / name) as found:
            found.verify()


def test_a_spare_steps_in(train: Train, tmp_path: Path, undisturbed: Result) -> None:
    outcome = disturbed(train(*SETTINGS, "--elastic.spares", 1), [(12, [1])], ranks=3).ok()
    assert (digest(outcome), exact(tmp_path / "run")) == undisturbed
    assert "1 spare" in outcome.text


def test_with_too_few_ranks_it_ends(train: Train) -> None:
    outcome = disturbed(train(*SETTINGS, "--elastic.min-ranks", 3), [(12, [1])], ranks=3)
    outcome.refused("rank 1 died", "--elastic.min-ranks is 3", "last checkpoint")
