"""A GPU whose memory does not hold a step: one message that says what to shrink, and a picture of what lay there.

torch.cuda.memory._record_memory_history notes each allocation with the lines of code that asked for it. It is on where
the settings ask for it only, since it costs some of every step. Its file is drawn by https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mpipar.errors import DeviceMemoryError
from mpipar.train.config import Config, TrainConfig

_GIB = 2**30
_HISTORY_ENTRIES = 100_000  # the latest: some tens of MB


@contextmanager
def explained(config: Config, device: torch.device, folder: Path, rank: int, sharing: int) -> Iterator[None]:
    """Around all that a rank computes.

    Args:
        config: The settings, resolved.
        device: Of this rank.
        folder: Of the run, where the picture is left.
        rank: This rank.
        sharing: How many ranks have its GPU.

    Raises:
        DeviceMemoryError: On the rank whose GPU ran out.
    """
    records = device.type == "cuda" and config.run.memory_history
    if records:
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        snapshot = _leave_snapshot(folder / f"memory-rank{rank}.pickle") if records else _HOW_TO_RECORD
        message = f"{_what_was_there(device)}: {_first_sentences(error)} {what_to_shrink(config.train, sharing)} "
        raise DeviceMemoryError(message + snapshot, rank=rank) from error


_HOW_TO_RECORD = "--run.memory-history true leaves a picture of who has it"


def what_to_shrink(train: TrainConfig, sharing: int) -> str:
    """In the order in which it costs least.

    Args:
        train: The settings.
        sharing: How many ranks have the GPU.
    """
    ways = []
    if sharing > 1:
        ways.append(f"start fewer ranks ({sharing} share this GPU)")
    if train.microbatch > 1:
        smaller = max(n for n in range(1, train.microbatch) if train.global_batch % n == 0)
        ways.append(f"--train.microbatch {smaller} instead of {train.microbatch} (the step stays as large)")
    if not train.activation_checkpointing:
        ways.append("--train.activation-checkpointing true (a third more time)")
    ways.append(f"a --train.seq-len below {train.seq_len}")
    return f"Shrink what it holds: {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}."


def _what_was_there(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.node()} has no memory left"
    whole = torch.cuda.get_device_properties(device)
    peak = torch.cuda.max_memory_allocated(device) / _GIB
    return (
        f"{whole.name} {device.index} of {platform.node()} has no memory left: of its {whole.total_memory / _GIB:.1f} "
        f"GiB this rank used {peak:.1f} at most"
    )


def _first_sentences(error: torch.cuda.OutOfMemoryError) -> str:
    """What torch tried; it goes on with a page of advice for programmers."""
    said = str(error).removeprefix("CUDA out of memory. ").splitlines() or [""]
    return said[0].partition("GPU ")[0].strip()


def _leave_snapshot(path: Path) -> str:
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except OSError as error:
        return f"The picture of it could not be written: {error.strerror}"
    return f"Who has it: {path}, for https://pytorch.org/memory_viz"
