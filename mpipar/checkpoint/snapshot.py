"""A copy of what a rank writes, in the host's memory: all that a run waits for that saves in the background.

Several threads copy side by side where cores are free: one alone does not use up what the memory can do (of 1.5 GB on
two cores 0.15 s alone, 0.11 by two).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_PIECE_BYTES = 4 << 20
_MOST_THREADS = 8


class Snapshot:
    """Memory for a copy; it is kept for the next one.

    Args:
        threads: How many may copy at a time.
    """

    def __init__(self, threads: int):
        self._threads = min(threads, _MOST_THREADS)
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Copies, [bytes] uint8 each, of bytes wherever they are; those taken before are overwritten.

        Copies from a GPU follow each other there, into memory that is pinned if the system has so much, and are waited
        for once. That wait has no deadline: who calls has seen the GPU done with all before (`Communicator.catch_up`),
        and is the one who would give it more, so it takes as long as the bytes do.
        """
        lengths = [len(source) for source in sources]
        on_gpu = any(source.is_cuda for source in sources)
        if self._memory.numel() != sum(lengths):
            self._memory = _allocate(sum(lengths), pinned=on_gpu)
        copies = list(self._memory.split(lengths))
        if on_gpu:
            for copy, source in zip(copies, sources, strict=True):
                copy.copy_(source, non_blocking=True)
            for device in {source.device for source in sources if source.is_cuda}:
                torch.cuda.current_stream(device).synchronize()
        else:
            self._copy(copies, sources)
        return copies

    def _copy(self, copies: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        pieces: SimpleQueue[tuple[NDArray[Any], NDArray[Any]]] = SimpleQueue()
        for copy, source in zip(copies, sources, strict=True):
            for piece in zip(copy.split(_PIECE_BYTES), source.split(_PIECE_BYTES), strict=True):
                pieces.put((piece[0].numpy(), piece[1].numpy()))

        def copy_what_is_left() -> None:
            with suppress(Empty):
                while True:
                    np.copyto(*pieces.get_nowait())

        helpers = [threading.Thread(target=copy_what_is_left, name="snapshot") for _ in range(self._threads - 1)]
        for helper in helpers:
            helper.start()
        copy_what_is_left()
        for helper in helpers:  # a piece each, at most
            helper.join()


def _allocate(num_bytes: int, *, pinned: bool) -> Tensor:
    """Memory of the host; where so much cannot be pinned, other memory, into which copies take longer."""
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:
        if not pinned:
            raise
        return torch.empty(num_bytes, dtype=torch.uint8)
