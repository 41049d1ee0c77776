"""What the user's environment asks for, which has to be the same on all ranks: MPIPAR_ALLREDUCE, MPIPAR_CUDA."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mpipar.errors import ConfigError

DEFAULT = "auto"


def wish(variable: str) -> str:
    """On this rank."""
    return os.environ.get(variable, DEFAULT)


def agreed(variable: str, choices: Sequence[str], wishes: Sequence[str]) -> str:
    """What the environments of all ranks ask for.

    Args:
        variable: Its name.
        choices: What it can be.
        wishes: Of each rank.

    Raises:
        ConfigError: There is no such choice, or ranks differ.
    """
    for rank, asked in enumerate(wishes):
        if asked not in choices:
            raise ConfigError(f"{variable}={asked}: must be one of {', '.join(choices)}")
        if asked != wishes[0]:
            raise ConfigError(
                f"{variable} is {wishes[0]} on rank 0 and {asked} on rank {rank}: give it to all, as with mpirun -x "
                f"{variable}"
            )
    return wishes[0]
