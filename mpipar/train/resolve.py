"""What the settings leave to the machine, decided for all ranks alike: they must round alike."""

from __future__ import annotations

from dataclasses import replace

from mpipar.comm import Mesh
from mpipar.processor import bf16_is_fast
from mpipar.train.config import Config


def resolve(config: Config, mesh: Mesh) -> Config:
    """The settings with nothing left to a rule or to the machine. Collective."""
    train = config.train
    if train.precision == "auto":
        everywhere = all(mesh.world.all_gather_object(bf16_is_fast()))
        train = replace(train, precision="bf16" if everywhere else "fp32")
    if train.threads == 0:
        # One number for all ranks: a product that is cut over another number of threads need not have the same bits.
        threads = 1 if train.reproducible else min(mesh.world.all_gather_object(mesh.cores_per_rank()))
        train = replace(train, threads=threads)
    return replace(config, model=config.model.resolved(), train=train)
