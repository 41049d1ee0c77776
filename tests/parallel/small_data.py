"""A data set of a few hundred random tokens, and a model that is trained on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpipar.comm import Communicator
from mpipar.data import tokenizer
from mpipar.data.shard import write_shard
from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.train.config import Config, DataConfig, DeviceName, PrecisionName, RunConfig, TrainConfig
from mpipar.train.dealing import Team
from mpipar.train.device import place_all, start
from mpipar.train.source import Source, Stock
from mpipar.train.step import TrainStep


def write_small_data(folder: Path) -> None:
    """Writes it, with its tokenizer. On one rank."""
    folder.mkdir()
    made_by = tokenizer.train(["some text " * 9], 270)
    (folder / "tokenizer.json").write_text(made_by.text)
    tokens = np.random.default_rng(0).integers(0, made_by.vocab_size, 900, dtype=np.uint32)
    for split in ("train", "val"):
        write_shard(folder, split, 0, 1, [tokens], made_by, 1)


def small_step(
    comm: Communicator,
    folder: Path,
    *,
    reproducible: bool,
    precision: PrecisionName = "fp32",
    microbatch: int = 2,
    device: DeviceName = "cpu",
) -> tuple[TrainStep, Source]:
    """Collective: a step of a small model, and what it reads. Both are to be closed.

    Args:
        comm: The dp axis.
        folder: Of this test, the same on all ranks, where the data set is, or will be.
        reproducible: Whether its gradients are summed exactly.
        precision: Of its matrix products.
        microbatch: Sequences in each; a step has 8.
        device: Where it computes.
    """
    if comm.rank == 0 and not (folder / "data").exists():
        write_small_data(folder / "data")
    comm.barrier()
    config = Config(
        run=RunConfig(dir=folder / "run"),
        data=DataConfig(dir=(folder / "data",)),
        model=ModelConfig(layers=1, dim=32, heads=2, max_seq_len=32),
        train=TrainConfig(
            global_batch=8,
            microbatch=microbatch,
            seq_len=16,
            eval_sequences=2,
            precision=precision,
            device=device,
            reproducible=reproducible,
        ),
    )
    placement = place_all(device, comm)
    here = placement.device(comm.rank)
    start(here, precision)
    model = Transformer(config.model, vocab_size=300)
    initialise(model, 1)
    step = TrainStep(model.to(here), config, comm, placement)
    return step, Source(config, Stock.take(config), Team.of(comm, comm.size), None, here)
