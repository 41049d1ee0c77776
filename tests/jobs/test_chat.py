"""Fine-tuning on conversations: the same bits at every rank count, mixed with text, also where nothing counts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs.conftest import WORDS
from tests.jobs.launch import run
from tests.jobs.results import digest, metrics

pytestmark = pytest.mark.timeout(180)

Train = Callable[..., list[str]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of which few tokens are answers; two records are bad."""
    path = tmp_path_factory.mktemp("records") / "chats.jsonl"
    draw = random.Random(1)
    lines = []
    for _ in range(150):
        turns = [("user", draw.randint(3, 30)), ("assistant", draw.randint(1, 6))] * draw.randint(1, 3)
        messages = [{"role": role, "content": " ".join(draw.choices(WORDS, k=num))} for role, num in turns]
        lines.append(json.dumps({"messages": [{"role": "system", "content": "be brief"}, *messages]}))
    lines[7:7] = [json.dumps({"messages": [{"role": "user", "content": "a"}]}), '{"text": "a"}']
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def chats(data: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed by two ranks."""
    out = tmp_path_factory.mktemp("data") / "chats"
    said = run(2, *pack(data, records, out)).ok()
    assert "skipped 2 files or records: no answer 1, no messages 1" in said.text
    assert f"{records}, record 8: no answer (no message is of 'assistant')" in said.text
    assert "are of answers, and count" in said.text
    return out


def pack(data: Path, records: Path, out: Path, chat: str = "chatml") -> list[str]:
    tokenizer = str(data / "tokenizer.json")
    return ["-m", "mpipar.data", "pack", str(records), "--chat", chat, "--tokenizer", tokenizer, "--out", str(out)]


def test_one_rank_packs_the_same(data: Path, records: Path, chats: Path, tmp_path: Path) -> None:
    run(1, *pack(data, records, tmp_path / "one")).ok()
    for path in chats.iterdir():
        assert (tmp_path / "one" / path.name).read_bytes() == path.read_bytes()
    assert "already packed" in run(1, *pack(data, records, chats)).ok().text
    run(1, *pack(data, records, chats, "llama3")).refused("packed from other input or with other settings")


def test_fine_tuning_begins_with_the_weights_of_another_run(
    train: Train, data: Path, chats: Path, tmp_path: Path
) -> None:
    """On other data, from step 0, with an optimizer of its own; what it has begun it goes on with."""
    run(2, *train("--train.steps", 30, folder="before")).ok()
    settings = ["--data.dir", chats, "--train.steps", 4, "--train.warmup-steps", 2, "--checkpoint.every", 2]
    tuned = run(2, *train(*settings, "--init", tmp_path / "before", folder="tuned")).ok()
    assert "a fresh start, with the weights of step 30 " in tuned.text
    from_nothing = run(1, *train(*settings, folder="nothing")).ok()
    first, without = (metrics(tmp_path / folder)[0] for folder in ("tuned", "nothing"))
    assert first["step"] == without["step"] == 1 and first["loss"] != without["loss"]
    run(1, *train("--train.steps", 1, "--init", tmp_path / "before", folder="same")).ok()
    before, same = metrics(tmp_path / "before"), metrics(tmp_path / "same")
    assert same[0]["step"] == 1 and same[0]["loss"] < before[0]["loss"] - 0.5
    again = run(1, *train(*settings, "--init", tmp_path / "before", folder="again")).ok()
    assert digest(again) == digest(tuned) != digest(from_nothing)
    earlier = ["--resume", tmp_path / "tuned" / "checkpoints" / "step-00000002"]
    resumed = run(1, *train(*settings, "--init", tmp_path / "before", *earlier, folder="resumed")).ok()
    assert "goes on from step 2" in resumed.text and digest(resumed) == digest(tuned)
    wider = run(2, *train(*settings, "--init", tmp_path / "before", "--model.dim", 64, folder="wider"))
    wider.refused("is of another model: --model.dim was 32 and is 64")
    run(2, *train(*settings, "--init", tmp_path / "nix", folder="nix")).refused("--init", "is not a folder")
    run(2, *train(*settings, "--init", tmp_path / "before", folder="nothing")).refused("that began without it")
    run(2, *train(*settings, "--init", tmp_path / "same", folder="tuned")).refused("that began with ")
    assert "goes on from step 4" in run(2, *train(*settings, "--init", tmp_path / "before", folder="tuned")).ok().text


def test_the_same_at_every_rank_count(train: Train, data: Path, chats: Path) -> None:
    settings = ["--data.dir", data, chats, "--data.weights", 1, 3, "--data.documents", "separate", "--train.steps", 8]
    first = run(1, *train(*settings, folder="one")).ok()
    assert digest(run(2, *train(*settings, folder="two")).ok()) == digest(first)


def test_steps_in_which_nothing_counts(train: Train, chats: Path, tmp_path: Path) -> None:
    settings = ["--data.dir", chats, "--train.seq-len", 4, "--train.global-batch", 2, "--train.steps", 12]
    said = run(2, *train(*settings, "--train.eval-sequences", 200)).ok()
    losses = [values["loss"] for values in metrics(tmp_path / "run") if "loss" in values]
    assert len(losses) == 12 and 0 in losses and any(loss > 0 for loss in losses)
    assert "skipped" not in said.text


def test_validation_in_which_nothing_counts(train: Train, chats: Path) -> None:
    settings = ["--data.dir", chats, "--train.seq-len", 1, "--train.eval-sequences", 1, "--train.microbatch", 1]
    run(2, *train(*settings)).refused("none of the 1 validation sequences has a token of an answer in it")
