"""Microbatches of random tokens: what a training step takes, without a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mpipar.data import Microbatch, Sequences
from mpipar.train.config import TrainConfig


class RandomTokens:
    """A source whose microbatch (step, index) is a function of both alone.

    Args:
        train: The sizes.
        vocab_size: Token ids.
        device: Where they are wanted.
        mine: This rank's microbatches of a step, in order.
    """

    def __init__(self, train: TrainConfig, vocab_size: int, device: torch.device, mine: Sequence[int]):
        self._shape = (train.microbatch, train.seq_len + 1)
        self._num_microbatches = train.num_microbatches
        self._vocab_size = vocab_size
        self._device = device
        self._mine = mine

    def microbatches(self, step: int) -> Iterator[Microbatch]:
        """This rank's microbatches of a step, on the way that those of a data set take."""
        for index in self._mine:
            generator = torch.Generator().manual_seed(step * self._num_microbatches + index)
            tokens = torch.randint(self._vocab_size, self._shape, generator=generator)
            read = Sequences(tokens, None, None)
            placed = read.pinned().on(self._device) if self._device.type == "cuda" else read
            yield Microbatch(index, placed, is_last=index == self._mine[-1])
