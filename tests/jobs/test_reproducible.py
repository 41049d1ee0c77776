"""One run, the same to the bit on any number of ranks: every loss, and the digest of what it ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def test_resumed_at_another_size(train: Train, tmp_path: Path, expected: dict[str, Any]) -> None:
    """Three steps on three ranks, three on two."""
    if not expected:
        expected.update(digest=digest(run(1, *train(*SETTINGS, folder="whole")).ok()), losses=exact(tmp_path / "whole"))
    first = run(3, *train(*SETTINGS, folder="three")).ok()
    assert digest(first) == expected["digest"]
    earlier = tmp_path / "three" / "checkpoints" / "step-00000003"
    second = run(2, *train(*SETTINGS, "--resume", earlier, folder="two")).ok()
    assert "goes on from step 3" in second.text
    assert digest(second) == expected["digest"]
    assert exact(tmp_path / "two") == expected["losses"][4:]


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
