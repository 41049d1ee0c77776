"""What a run has come to: what two runs have to have in common, to the bit, to be one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mpipar import checkpoint
from tests.jobs.launch import Outcome

# What of a line of metrics.jsonl must not depend on when and where it was computed, nor on how many ranks.
EXACT = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss", "val_losses")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def exact(folder: Path) -> list[dict[str, Any]]:
    """Of all lines of metrics.jsonl what must be the same."""
    return [{key: line[key] for key in EXACT if key in line} for line in metrics(folder)]


def digest(outcome: Outcome) -> str:
    """Of weights and optimizer, as the run says it at its end, once."""
    (found,) = digests(outcome)
    return found


def digests(outcome: Outcome) -> list[str]:
    """All that were said: a rank that dies while it speaks has the next one say it again."""
    return [line.removeprefix("digest: ").strip() for line in outcome.lines if line.startswith("digest: ")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the latest checkpoint: weights and optimizer."""
    latest = checkpoint.latest(folder / "checkpoints")
    assert latest is not None
    with checkpoint.load(latest) as found:
        return dict(found)


def assert_same_run(one: Path, other: Path) -> None:
    """Two run folders have the same metrics, and end with the same tensors."""
    assert exact(one) == exact(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
