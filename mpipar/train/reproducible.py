"""What has to hold so that the number of ranks does not enter the bits of a run.

Covered: how many ranks there are, on how many hosts, which of them computes which microbatch, where the run stops and
goes on, which ranks die. Not covered: another version of torch, another type of processor, another number of threads a
rank; and, once there is tensor parallelism, another degree of it.
"""

from __future__ import annotations

import torch

from mpipar.comm import Communicator, agreement
from mpipar.errors import ConfigError
from mpipar.processor import processor_name
from mpipar.train.config import Config

# Settings of a reproducible run that another start of it may not change: beside those of any run.
MUST_MATCH = (("train", "reproducible"), ("train", "microbatch"), ("train", "precision"), ("train", "threads"))


def prepare(config: Config, world: Communicator) -> None:
    """Makes torch take deterministic kernels, and refuses what would break the promise. Collective.

    Raises:
        ConfigError: A setting, or the machine, cannot keep it.
    """
    machines = world.all_gather_object(_machine())
    with agreement(world):
        if config.train.compile:
            raise ConfigError(
                "--train.compile true with --train.reproducible true: what the compiler makes of a model may add in "
                "another order in the next process. Take one of both"
            )
        for rank, machine in enumerate(machines):
            if machine != machines[0]:
                raise ConfigError(
                    f"--train.reproducible true: rank 0 has {machines[0]}, rank {rank} has {machine}. Kernels "
                    "differ in their bits between processors and versions: take hosts of one kind"
                )
    torch.use_deterministic_algorithms(True)


def _machine() -> str:
    """What decides which kernels torch takes."""
    return f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}) on {processor_name()}"
