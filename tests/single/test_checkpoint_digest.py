"""One number for a state."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpipar import checkpoint
from mpipar.checkpoint.__main__ import find
from mpipar.errors import CheckpointError


def state() -> dict[str, Tensor]:
    return {
        "weights/b": torch.arange(6, dtype=torch.float32).view(2, 3),
        "weights/a": torch.ones(2, dtype=torch.bfloat16),
        "optimizer/b/step": torch.tensor(3.0),
    }


def test_it_is_what_its_description_says() -> None:
    """Made by hand from the description, so that others can make it too."""
    expected = hashlib.sha256()
    expected.update(b"optimizer/b/step float32 scalar\n" + bytes.fromhex("00004040"))
    expected.update(b"weights/a bfloat16 2\n" + bytes.fromhex("803f803f"))
    expected.update(b"weights/b float32 2x3\n" + state()["weights/b"].numpy().tobytes())
    assert checkpoint.digest(state()) == f"sha256:{expected.hexdigest()}"


def test_order_and_layout_do_not_enter() -> None:
    other = dict(reversed(state().items()))
    other["weights/b"] = other["weights/b"].T.contiguous().T
    assert checkpoint.digest(other) == checkpoint.digest(state())


@pytest.mark.parametrize("name", ["weights/a", "weights/b", "optimizer/b/step"])
def test_any_change_is_another_digest(name: str) -> None:
    other = state()
    other[name] = other[name] * (1 + 2**-7)
    assert checkpoint.digest(other) != checkpoint.digest(state())
    renamed = state()
    renamed["weights/c"] = renamed.pop(name)
    assert checkpoint.digest(renamed) != checkpoint.digest(state())


def test_of_a_checkpoint_in_a_file(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "checkpoints", 3, state(), {}, files={}, keep=1)
    for folder in (tmp_path, tmp_path / "checkpoints", path):
        assert find(folder) == path
    with checkpoint.load(path) as found:
        assert checkpoint.digest(found) == checkpoint.digest(state())
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find(tmp_path / "elsewhere")
