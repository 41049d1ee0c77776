"""A run that reads several data sets: the same bits at every rank count, and on going on; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.launch import Outcome, run
from tests.jobs.results import exact

pytestmark = pytest.mark.timeout(180)

Train = Callable[..., list[str]]
# The second data set ends within the run.
MIX = ["--data.weights", 2, 1, "--data.epochs", 0, 1, "--data.documents", "separate"]
SETTINGS = ["--train.steps", 14, "--train.global-batch", 6, "--train.eval-every", 7, "--checkpoint.every", 7]


@pytest.fixture(scope="module")
def second(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second")
    for name, text in (("a", "this is another text " * 60), ("b", "and one more, not long " * 20), ("c", "short")):
        (folder / f"{name}.txt").write_text(text)
    out = tmp_path_factory.mktemp("data") / "second"
    run(
        1, "-m", "mpipar.data", "pack", str(folder), "--out", str(out), "--tokenizer", str(data / "tokenizer.json")
    ).ok()
    return out


def digest(outcome: Outcome) -> str:
    (line,) = [line for line in outcome.lines if line.startswith("digest: ")]
    return line


def test_the_same_at_every_rank_count_and_resumed(train: Train, data: Path, second: Path, tmp_path: Path) -> None:
    settings = ["--data.dir", data, second, *MIX, *SETTINGS]
    first = run(1, *train(*settings, folder="one")).ok()
    assert f"mix     66.67% {data}" in first.text
    assert f"mix     33.33% {second}" in first.text and "ends after 1 epoch" in first.text
    assert digest(run(3, *train(*settings, folder="three")).ok()) == digest(first)
    again = run(2, *train(*settings, "--resume", tmp_path / "one/checkpoints/step-00000007", folder="two")).ok()
    assert "goes on from step 7" in again.text
    assert digest(again) == digest(first)
    lines = exact(tmp_path / "one")
    assert exact(tmp_path / "three") == lines
    assert exact(tmp_path / "two") == [line for line in lines if line["step"] > 7]
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [7, 14]
    assert all(line["val_losses"].keys() == {str(data), str(second)} for line in evaluations)
    for folder, loss in evaluations[1]["val_losses"].items():
        assert f"step     14/14  val_loss {loss:.4f} of {folder}" in first.text

    # The loss of the first data set is what a run that reads that alone comes to.
    alone = ["--data.dir", data, "--data.documents", "separate", "--init", tmp_path / "one", "--train.steps", 0]
    run(1, *train(*alone, "--train.eval-sequences", 2, folder="alone")).ok()
    (line,) = exact(tmp_path / "alone")
    assert line["val_loss"] == evaluations[1]["val_losses"][str(data)] and "val_losses" not in line

    changed = run(1, *train(*settings, "--data.documents", "joined", folder="one"))
    changed.refused("is of another run", "the data's documents was 'separate' and is 'joined'")


def test_data_that_ends_too_early(train: Train, data: Path, second: Path) -> None:
    ends = ["--data.dir", second, "--data.epochs", 1, "--train.steps", 1000]
    run(2, *train(*ends)).refused("--data.epochs 1 ends the data after", "--train.steps is 1,000")


def test_another_tokenizer(train: Train, data: Path, text_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(1, "-m", "mpipar.data", "pack", str(text_folder), "--out", str(other), "--vocab-size", "310").ok()
    run(2, *train("--data.dir", data, other)).refused("packed with another tokenizer", "--tokenizer")
