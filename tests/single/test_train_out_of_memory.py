"""What is said when a GPU's memory does not hold a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpipar.errors import DeviceMemoryError
from mpipar.train.config import Config, RunConfig, TrainConfig
from mpipar.train.out_of_memory import explained, what_to_shrink

TORCHS = (
    "CUDA out of memory. Tried to allocate 24.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 3.12 GiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to "
    "avoid fragmentation.  See documentation for Memory Management"
)


@pytest.mark.parametrize(
    ("train", "sharing", "said"),
    [
        (
            TrainConfig(global_batch=24, microbatch=8),
            1,
            "Shrink what it holds: --train.microbatch 6 instead of 8 (the step stays as large), "
            "--train.activation-checkpointing true (a third more time) or a --train.seq-len below 128.",
        ),
        (
            TrainConfig(microbatch=1, activation_checkpointing=True),
            1,
            "Shrink what it holds: a --train.seq-len below 128.",
        ),
        (
            TrainConfig(microbatch=1, activation_checkpointing=True),
            4,
            "Shrink what it holds: start fewer ranks (4 share this GPU) or a --train.seq-len below 128.",
        ),
    ],
)
def test_what_to_shrink(train: TrainConfig, sharing: int, said: str) -> None:
    assert what_to_shrink(train, sharing) == said


def test_one_message(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(DeviceMemoryError) as caught, explained(Config(), cpu, tmp_path, 3, 1):
        raise torch.cuda.OutOfMemoryError(TORCHS)
    said = str(caught.value)
    assert "has no memory left: Tried to allocate 24.00 GiB. Shrink what it holds" in said
    assert "PYTORCH_ALLOC_CONF" not in said and "\n" not in said
    assert said.endswith("--run.memory-history true leaves a picture of who has it (rank 3)")
    assert not caught.value.passing, "another start would end the same way"


def test_other_errors_are_their_own(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), explained(Config(), torch.device("cpu"), tmp_path, 0, 1):
        raise ZeroDivisionError


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_full_gpu_leaves_its_picture(tmp_path: Path) -> None:
    config, gpu = Config(run=RunConfig(memory_history=True)), torch.device("cuda", 0)
    with pytest.raises(DeviceMemoryError, match="used 0") as caught, explained(config, gpu, tmp_path, 0, 1):
        torch.empty(1 << 50, dtype=torch.uint8, device=gpu)
    assert "Tried to allocate" in str(caught.value)
    assert (tmp_path / "memory-rank0.pickle").stat().st_size > 0
    torch.cuda.memory._record_memory_history(enabled=None)
