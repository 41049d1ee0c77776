"""Question: does a reproducible run on GPUs have the same bits on another number of ranks?

    mpirun -n 1 python -m benchmarks.gpu_reproducible
    mpirun -n 2 python -m benchmarks.gpu_reproducible      prints the same JSON

A small GPT takes a few steps on random tokens. What is printed is every loss, to the bit, and the digest of all weights
and optimizer state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from benchmarks.random_tokens import RandomTokens
from mpipar.comm import Communicator, Grid, Mesh, decide_on_root, run_job
from mpipar.command_line import parse
from mpipar.model import ModelConfig
from mpipar.train import reproducible
from mpipar.train.config import Config, DeviceName, PrecisionName, TrainConfig
from mpipar.train.device import start
from mpipar.train.loop import build_model
from mpipar.train.resolve import resolve
from mpipar.train.step import TrainStep

_VOCAB_SIZE = 2048
_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options."""

    device: DeviceName = "cuda"
    """Where ranks compute."""
    precision: PrecisionName = "bf16"
    """Of matrix products."""


def main(world: Communicator) -> None:
    asked = decide_on_root(world, lambda: parse(Asked, "python -m benchmarks.gpu_reproducible", description=__doc__))
    mesh = Mesh(world, Grid.of(world.size))
    config, placement = resolve(
        Config(
            model=ModelConfig(layers=4, dim=256, heads=4, max_seq_len=256, dropout=0.1),
            train=TrainConfig(
                global_batch=16, microbatch=2, seq_len=256, device=asked.device, precision=asked.precision
            ),
        ),
        mesh,
    )
    train = config.train
    torch.set_num_threads(train.threads)
    reproducible.prepare(config, world, placement)
    device = placement.device(world.rank)
    start(device, train.precision)
    step = TrainStep(build_model(config, _VOCAB_SIZE).to(device), config, mesh["dp"], placement)
    mine = range(train.num_microbatches)[world.rank :: world.size]
    source = RandomTokens(train, _VOCAB_SIZE, device, mine)
    losses: list[str] = []
    while len(losses) < _STEPS:
        computed = step.compute(len(losses), source, stop=False)
        if step.fits():
            losses.append(step.apply(computed).loss.hex())
    digest = step.digest()
    if world.rank == 0:
        print(json.dumps({"losses": losses, "digest": digest}), flush=True)


if __name__ == "__main__":
    run_job(main)
