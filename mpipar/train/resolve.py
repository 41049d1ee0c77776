"""What the settings leave to the machine, decided for all ranks alike: they must round alike."""

from __future__ import annotations

from dataclasses import replace

from mpipar.comm import Mesh, agreement
from mpipar.errors import ConfigError
from mpipar.processor import bf16_is_fast
from mpipar.train.config import Config, PrecisionName, TrainConfig
from mpipar.train.device import Placement, place_all

_BF16_CAPABILITY = (8, 0)  # from Ampere on


def resolve(config: Config, mesh: Mesh) -> tuple[Config, Placement]:
    """The settings with nothing left to a rule or to the machine, and where the ranks compute. Collective.

    Raises:
        ConfigError: A device, or a precision, was asked for that is not there.
    """
    placement = place_all(config.train.device, mesh.world)
    train = replace(config.train, device="cuda" if placement.on_gpus else "cpu")
    if train.precision == "auto" and not placement.on_gpus:
        everywhere = all(mesh.world.all_gather_object(bf16_is_fast()))
        train = replace(train, precision="bf16" if everywhere else "fp32")
    with agreement(mesh.world):
        train = replace(train, precision=precision_on(placement, train))
    if train.threads == 0:
        # One number for all ranks: a product that is cut over another number of threads need not have the same bits.
        threads = 1 if train.reproducible else min(mesh.world.all_gather_object(mesh.cores_per_rank))
        train = replace(train, threads=threads)
    return replace(config, model=config.model.resolved(), train=train), placement


def precision_on(placement: Placement, train: TrainConfig) -> PrecisionName:
    """The precision of the run: on GPUs auto is bf16 where all have it built in, else fp16.

    Raises:
        ConfigError: What was asked for is not there.
    """
    asked = train.precision
    if not placement.on_gpus:
        if asked in ("fp16", "tf32"):
            raise ConfigError(
                f"--train.precision {asked} is for GPUs, and this run is on the CPU: take bf16 or fp32, or a host with "
                "GPUs and --train.device cuda"
            )
        return asked
    old = [gpu.name for gpu in placement.gpus if gpu.capability < _BF16_CAPABILITY]
    if asked == "auto":
        return "fp16" if old else "bf16"
    if asked in ("bf16", "tf32") and old:
        raise ConfigError(f"--train.precision {asked}: {old[0]} does not have it built in. Take fp16 or fp32")
    return asked
