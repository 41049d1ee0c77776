"""One run, the same to the bit on any number of ranks: every loss, and the digest of what it ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.conftest import TINY
from tests.jobs.launch import run
from tests.jobs.results import digest, exact

pytestmark = pytest.mark.timeout(120)

Train = Callable[..., list[str]]
SETTINGS = ["--train.steps", 6, "--train.global-batch", 7, "--train.eval-every", 3, "--checkpoint.every", 3]
SETTINGS += ["--model.dropout", 0.1]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Of the first run that a test has made, for the others to compare with."""
    return {}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8])
def test_any_number_of_ranks(train: Train, tmp_path: Path, expected: dict[str, Any], num_ranks: int) -> None:
    outcome = run(num_ranks, *train(*SETTINGS)).ok()
    assert "exactly" in outcome.text
    found = {"digest": digest(outcome), "losses": exact(tmp_path / "run")}
    assert len(found["losses"]) == 8  # six steps, two evaluations
    assert found == (expected or found)
    expected.update(found)
    shown = run(0, "-m", "mpipar.checkpoint", "digest", str(tmp_path / "run")).ok()
    assert shown.lines == [found["digest"]]


@pytest.fixture(scope="module")
def saved_by_four(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of step 3 that four ranks have written, and what came of the run after it."""
    folder = tmp_path_factory.mktemp("four") / "run"
    arguments = ["-m", "mpipar.train", "--data.dir", data, "--run.dir", folder, *TINY, *SETTINGS]
    outcome = run(4, *map(str, arguments)).ok()
    return folder / "checkpoints" / "step-00000003", {"digest": digest(outcome), "losses": exact(folder)}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6, 8])
def test_resumed_at_another_size(
    train: Train, tmp_path: Path, saved_by_four: tuple[Path, dict[str, Any]], num_ranks: int
) -> None:
    """Three steps on four ranks, three on others: each reads a share of what four have written."""
    checkpoint, expected = saved_by_four
    outcome = run(num_ranks, *train(*SETTINGS, "--resume", checkpoint)).ok()
    assert "goes on from step 3" in outcome.text
    assert digest(outcome) == expected["digest"]
    assert exact(tmp_path / "run") == expected["losses"][4:]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_checkpoints_change_nothing(
    train: Train, tmp_path: Path, saved_by_four: tuple[Path, dict[str, Any]], asynchronous: str
) -> None:
    """In the background or not, one after each step; some are kept for good."""
    settings = ["--checkpoint.every", 1, "--checkpoint.keep", 1, "--checkpoint.keep-every", 2]
    outcome = run(2, *train(*SETTINGS, *settings, "--checkpoint.asynchronous", asynchronous)).ok()
    assert digest(outcome) == saved_by_four[1]["digest"]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004", "step-00000006"]
    for path in kept:
        run(0, "-m", "mpipar.checkpoint", "verify", str(tmp_path / "run" / "checkpoints" / path)).ok()


def test_what_would_break_the_promise_is_refused(train: Train) -> None:
    run(1, *train("--train.compile", "true")).refused("--train.compile", "--train.reproducible")
    run(1, *train("--train.steps", 2)).ok()
    refused = run(1, *train("--train.steps", 4, "--train.threads", 2))
    refused.refused("--train.threads was 1 and is 2")


def test_without_it_the_cores_are_shared_out(train: Train) -> None:
    outcome = run(1, *train("--train.steps", 2, "--train.reproducible", "false")).ok()
    assert "exactly" not in outcome.text and digest(outcome).startswith("sha256:")


def test_a_digest_of_nothing_is_refused(tmp_path: Path) -> None:
    run(0, "-m", "mpipar.checkpoint", "digest", str(tmp_path)).refused("holds no checkpoint")
