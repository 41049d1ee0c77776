"""Real gradients: those of the default model in training, microbatch by microbatch, and the grids that fit them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.representations import BLOCK, Representation
from mpipar.comm import Communicator, Mesh, agreement, decide_on_root
from mpipar.comm.exact import FIRST_TOP, next_top
from mpipar.model import begin_microbatch
from mpipar.parallel.exact import separate_use
from mpipar.train import reproducible
from mpipar.train.config import Config, DataConfig, TrainConfig
from mpipar.train.dealing import Team
from mpipar.train.loop import build_model
from mpipar.train.resolve import resolve
from mpipar.train.source import Source, Stock
from mpipar.train.step import TrainStep

Contribution = tuple[str, Tensor]
"""The name of a weight, and the gradient of one of its uses in one microbatch: [n] float32."""

LargestOfBlocks = Mapping[str, Sequence[float]]
"""For each tensor the largest element of each of its blocks."""


class Training:
    """The default model in training, whose gradients can be looked at before each step. Collective to build.

    Args:
        mesh: The ranks of the job.
        data: The data set.
        microbatches: In a step, over all ranks.

    Raises:
        DataError: The data set is missing, or too small.
    """

    def __init__(self, mesh: Mesh, data: Path, microbatches: int):
        train = TrainConfig(global_batch=microbatches * TrainConfig.microbatch, device="cpu")
        self.config, placement = resolve(Config(data=DataConfig(dir=(data,)), train=train), mesh)
        self._comm = mesh["dp"]
        stock = decide_on_root(mesh.world, lambda: Stock.take(self.config))
        with agreement(mesh.world):
            self._source = Source(self.config, stock, Team.of(self._comm, self._comm.size), counter=None)
        reproducible.prepare(self.config, mesh.world, placement)
        self.model = build_model(self.config, self._source.vocab_size)
        self._take_step = TrainStep(self.model, self.config, self._comm)
        self.sizes = {name: p.numel() for name, p in self.model.named_parameters() if p.requires_grad}
        self._done = 0
        self._mine = self._source.dealing.first

    @property
    def mine(self) -> Sequence[int]:
        """This rank's microbatches of a step."""
        return self._mine

    def step(self) -> None:
        """Changes the weights. Collective."""
        computed = self._take_step.compute(self._done, self._source, stop=False)
        if self._take_step.fits():
            self._take_step.apply(computed)
            self._done += 1

    def deal_otherwise(self) -> None:
        """From now on ranks take runs of microbatches, the last first, instead of every n-th."""
        run = range(self.config.train.num_microbatches)[self._comm.chunk(self.config.train.num_microbatches)]
        self._mine = run[::-1]

    def gradients(self) -> Iterator[Contribution]:
        """Those of this rank's microbatches of the coming step. The weights, and the step's own, stay as they are."""
        train = self.config.train
        weights = dict(self.model.named_parameters())
        for index in self._mine:
            second: list[Tensor] = []  # of the tied weight, as the head's
            begin_microbatch(self.model, train.seed, self._done, index)
            as_head, self.model.as_head = self.model.as_head, partial(separate_use, add=second.append)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=train.precision == "bf16"):
                loss, _ = self.model.loss(*self._source.microbatch(self._done, index))
            self.model.as_head = as_head
            # Unlike backward(), this calls no hooks: nothing is added to the gradients of the step.
            found = torch.autograd.grad(loss, [weights[name] for name in self.sizes], allow_unused=True)
            for name, gradient in [*zip(self.sizes, found, strict=True), *(("embedding.weight", x) for x in second)]:
                if gradient is not None:
                    yield name, gradient.contiguous().view(-1)

    def close(self) -> None:
        """Closes the data set."""
        self._source.close()


class History:
    """The tops of the grids of one representation, kept as `parallel.exact.Grids` keeps them.

    Args:
        how: The representation.
        sizes: Elements of each tensor.
    """

    def __init__(self, how: Representation, sizes: Mapping[str, int]):
        self.how = how
        self._seen: dict[str, list[int | None]] = {
            name: [None] * (-(-size // BLOCK) if how.blocks else 1) for name, size in sizes.items()
        }

    @property
    def tops(self) -> dict[str, list[int]]:
        """Of the coming step: for each tensor one, or one for each block."""
        return {name: [FIRST_TOP if top is None else top for top in tops] for name, tops in self._seen.items()}

    def overflowed(self, largest: LargestOfBlocks) -> bool:
        """Whether a contribution was too large for its grid."""
        if self.how.rounds:
            return False
        values = self._per_grid(largest)
        return any(
            value > 2.0 ** (top + self.how.room)
            for name, tops in self.tops.items()
            for top, value in zip(tops, values[name], strict=True)
        )

    def move_on(self, largest: LargestOfBlocks) -> None:
        """To the next step, or to the second attempt at one that overflowed."""
        values = self._per_grid(largest)
        self._seen = {
            name: [next_top(top, value) for top, value in zip(tops, values[name], strict=True)]
            for name, tops in self._seen.items()
        }

    def _per_grid(self, largest: LargestOfBlocks) -> LargestOfBlocks:
        return largest if self.how.blocks else {name: [max(values)] for name, values in largest.items()}


def largest_of_blocks(
    comm: Communicator, sizes: Mapping[str, int], contributions: Iterable[Contribution]
) -> LargestOfBlocks:
    """Collective: over all contributions on all ranks."""
    counts = {name: -(-size // BLOCK) for name, size in sizes.items()}
    largest = {name: np.zeros(count) for name, count in counts.items()}
    for name, x in contributions:
        blocks = torch.stack([block.abs().max() for block in x.split(BLOCK)]).numpy()
        np.maximum(largest[name], blocks, out=largest[name])
    everywhere = comm.all_reduce(np.concatenate(list(largest.values())), "max")
    pieces = np.split(everywhere, np.cumsum(list(counts.values()))[:-1])
    return {name: piece.tolist() for name, piece in zip(counts, pieces, strict=True)}
